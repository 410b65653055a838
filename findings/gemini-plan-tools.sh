#!/usr/bin/env bash
# The tools of Gemini CLI in its read-only mode.
#
# Version: @google/gemini-cli 0.61.0 from npm. Needs bash, node, npm, python3.
#
# A good guess: with `--approval-mode plan`, which `--help` calls a read-only mode, the model is
# offered no tool that writes.
# Seen: it is offered `write_file` and `replace`, which write plans, and no shell.
#
# Where it matters: proto/src/prompt.rs gives `tools = read` a policy of its own and not this mode.
set -euo pipefail

work=$(mktemp -d)
server=
finish() {
    if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; fi
    rm -rf "$work"
}
trap finish EXIT

mkdir -p "$work/home/.gemini" "$work/tmp"
echo '{"security":{"auth":{"selectedType":"gemini-api-key"}}}' >"$work/home/.gemini/settings.json"
timeout 300 npm install --prefix "$work/cli" --no-audit --no-fund --ignore-scripts \
    --loglevel=error @google/gemini-cli@0.61.0 >&2

# It notes the tools of each request, and answers with an error. It is also the proxy for every
# other address, so that nothing leaves the machine.
cat >"$work/server.py" <<'PY'
import http.server
import json
import sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"{}"):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self):
        self.close_connection = True
        self.answer(502)

    def do_GET(self):
        self.answer(426)

    do_HEAD = do_GET

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        offered = [part["name"] for tool in request.get("tools", [])
                   for part in tool.get("functionDeclarations", [])]
        if offered:
            wanted = ("read_file", "replace", "run_shell_command", "write_file")
            print(*(name for name in wanted if name in offered), flush=True)
        self.answer(400)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
with open(sys.argv[1], "w") as port:
    port.write(f"{server.server_port}\n")
server.serve_forever()
PY
python3 "$work/server.py" "$work/port" >"$work/requests" 2>/dev/null &
server=$!
for _ in $(seq 100); do if [ -s "$work/port" ]; then break; fi; sleep 0.1; done
port=$(cat "$work/port")
cd "$work/home"
timeout 90 env -i PATH="$PATH" HOME="$work/home" TMPDIR="$work/tmp" \
    GEMINI_API_KEY=sample GOOGLE_GEMINI_BASE_URL="http://127.0.0.1:$port" \
    GEMINI_CLI_NO_RELAUNCH=true \
    HTTPS_PROXY="http://127.0.0.1:$port" NO_PROXY=127.0.0.1 \
    "$work/cli/node_modules/.bin/gemini" --skip-trust --approval-mode plan \
    --model gemini-2.5-pro --prompt=hello </dev/null >/dev/null 2>&1 || true

seen=$(sort -u "$work/requests" | paste -s -d ';')
expected="read_file"
recorded="read_file replace write_file"
echo "expected: $expected"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
