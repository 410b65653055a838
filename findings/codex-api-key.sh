#!/usr/bin/env bash
# Codex CLI and the documented variables for key and server.
#
# Version: @openai/codex 0.169.0 from npm. Needs bash, node, npm, python3.
#
# A good guess: `codex exec` takes its key from OPENAI_API_KEY and its server from
# OPENAI_BASE_URL, as OpenAI's client libraries do. Without a usable key it stops with an
# error before it sends anything.
# Seen: with OPENAI_API_KEY alone, Codex sends the prompt to the server without an
# `Authorization` header. Only CODEX_API_KEY becomes `Authorization: Bearer`. With
# OPENAI_BASE_URL, Codex asks the vendor's own address all the same; the option
# `-c openai_base_url=...` is what works.
#
# Where it matters: shim/src/provider/openai.rs sets both key variables, and a run's
# OPENAI_BASE_URL is written to the configuration file, where the option has the same name.
set -euo pipefail

work=$(mktemp -d)
server=
finish() {
    if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; fi
    rm -rf "$work"
}
trap finish EXIT

mkdir "$work/home" "$work/tmp"
timeout 300 npm install --prefix "$work/cli" --no-audit --no-fund --ignore-scripts \
    --loglevel=error @openai/codex@0.169.0 >&2

# It notes where a model request came and with which key. It is also the proxy for every
# other address, so that nothing leaves the machine.
cat >"$work/server.py" <<'PY'
import http.server
import sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_CONNECT(self):
        self.close_connection = True
        print("proxy", self.path, flush=True)
        self.answer(502)

    def do_GET(self):
        self.answer(426)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        form = self.path.split("/")[1]
        print(form, self.headers.get("Authorization", "without a key"), flush=True)
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

# Codex fails in the end, because the POST is answered with an error.
cd "$work/home"
for key in OPENAI_API_KEY CODEX_API_KEY; do
    timeout 60 env -i PATH="$PATH" HOME="$work/home" TMPDIR="$work/tmp" "$key=sample" \
        OPENAI_BASE_URL="http://127.0.0.1:$port/variable/v1" \
        HTTPS_PROXY="http://127.0.0.1:$port" NO_PROXY=127.0.0.1 \
        "$work/cli/node_modules/.bin/codex" exec --skip-git-repo-check \
        -c analytics.enabled=false -c "openai_base_url=\"http://127.0.0.1:$port/$key/v1\"" \
        hello </dev/null >/dev/null 2>&1 || true
done
# With the variable alone: the vendor's address, which the proxy refuses.
timeout 20 env -i PATH="$PATH" HOME="$work/home" TMPDIR="$work/tmp" CODEX_API_KEY=sample \
    OPENAI_BASE_URL="http://127.0.0.1:$port/variable/v1" \
    HTTPS_PROXY="http://127.0.0.1:$port" NO_PROXY=127.0.0.1 \
    "$work/cli/node_modules/.bin/codex" exec --skip-git-repo-check \
    -c analytics.enabled=false hello </dev/null >/dev/null 2>&1 || true

seen=$(grep -v '^proxy' "$work/requests" | paste -s -d ';')
if grep -qx 'proxy api.openai.com:443' "$work/requests"; then
    seen+=";variable not read: asks api.openai.com"
fi
recorded="OPENAI_API_KEY without a key;CODEX_API_KEY Bearer sample"
recorded+=";variable not read: asks api.openai.com"
echo "expected: OPENAI_API_KEY Bearer sample;CODEX_API_KEY Bearer sample;variable Bearer sample"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
