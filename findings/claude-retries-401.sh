#!/usr/bin/env bash
# Claude Code and a key that the API refuses.
#
# Version: @anthropic-ai/claude-code 2.1.197 from npm. Needs bash, node, npm, python3.
#
# A good guess: 401 says that the key is wrong, so Claude Code reports it after one request.
# Seen: it repeats the same request with the same key, with growing pauses, as it does for a
# server that is overloaded. With CLAUDE_CODE_MAX_RETRIES=2 it makes three requests. (Without
# it, version 2.1.332 made eleven in 176 s, and printed nothing until then.) If the answer
# has the header `x-should-retry: false`, there is one request.
#
# Where it matters: a run of this CLI (shim/src/provider/anthropic.rs) with a revoked key
# holds its slot until the CLI gives up or the run's deadline comes. A gateway in front of
# the API can send the header.
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
    --loglevel=error @anthropic-ai/claude-code@2.1.197 >&2

# The first part of the path names the case. It is also the proxy for every other address,
# so that nothing leaves the machine.
cat >"$work/server.py" <<'PY'
import http.server
import sys

BODY = b'{"type":"error","error":{"type":"authentication_error","message":"invalid x-api-key"}}'

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self):
        self.close_connection = True
        self.answer(502)

    def do_HEAD(self):
        self.answer(404)

    do_GET = do_HEAD

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        case, rest = self.path[1:].split("/", 1)
        if rest.startswith("v1/messages"):
            print(case, self.headers.get("x-api-key"), flush=True)
        no_retry = [("x-should-retry", "false")] if case == "header" else []
        self.answer(401, BODY, no_retry)

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
for case in plain header; do
    timeout 60 env -i PATH="$PATH" HOME="$work/home" TMPDIR="$work/tmp" \
        ANTHROPIC_API_KEY=sample ANTHROPIC_BASE_URL="http://127.0.0.1:$port/$case" \
        CLAUDE_CODE_MAX_RETRIES=2 CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 \
        HTTPS_PROXY="http://127.0.0.1:$port" NO_PROXY=127.0.0.1 \
        node "$work/cli/node_modules/@anthropic-ai/claude-code/cli-wrapper.cjs" \
        -p hello </dev/null >/dev/null 2>&1 || true
done

count() { grep -c "^$1 sample\$" "$work/requests" || true; }
seen="plain 401: $(count plain) requests; with x-should-retry: false: $(count header)"
recorded="plain 401: 3 requests; with x-should-retry: false: 1"
echo "expected: plain 401: 1 request; with x-should-retry: false: 1"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
