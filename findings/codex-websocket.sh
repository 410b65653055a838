#!/usr/bin/env bash
# Codex CLI and a gateway without WebSockets.
#
# Version: @openai/codex 0.169.0 from npm. Needs bash, node, npm, python3.
#
# Codex asks for a WebSocket (`GET /v1/responses` with `Upgrade`) before it falls back to
# `POST /v1/responses`.
#
# A good guess: a gateway that answers the upgrade with 404 says clearly that there is no
# such endpoint, so Codex sends its POST at once.
# Seen: after 404, Codex repeats the upgrade six times with growing pauses (some six
# seconds) and only then sends its POST. After 426 (Upgrade Required) it sends the POST at
# once. 501 has the same effect as 404.
#
# Where it matters: a run's `OPENAI_BASE_URL` (shim/src/provider/openai.rs) may be a gateway
# that answers 404, and then each run loses these seconds. The stand-in model API answers
# 426 for this reason (tests/stand_in/src/main.rs).
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

# The first part of the path is the answer to an upgrade. It is also the proxy for every
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
        self.answer(502)

    def do_GET(self):
        status = self.path.split("/")[1]
        print(status, "upgrade" if "Upgrade" in self.headers else "GET", flush=True)
        self.answer(int(status))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        print(self.path.split("/")[1], "POST", flush=True)
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
for status in 404 426; do
    # Codex fails in the end, because the POST is answered with an error.
    timeout 60 env -i PATH="$PATH" HOME="$work/home" TMPDIR="$work/tmp" CODEX_API_KEY=sample \
        HTTPS_PROXY="http://127.0.0.1:$port" NO_PROXY=127.0.0.1 \
        "$work/cli/node_modules/.bin/codex" exec --skip-git-repo-check \
        -c analytics.enabled=false -c "openai_base_url=\"http://127.0.0.1:$port/$status/v1\"" \
        hello </dev/null >/dev/null 2>&1 || true
done

count() { grep -c "^$1 $2\$" "$work/requests" || true; }
seen="404: $(count 404 upgrade) upgrades, then $(count 404 POST) POST; "
seen+="426: $(count 426 upgrade) upgrade, then $(count 426 POST) POST"
recorded="404: 7 upgrades, then 1 POST; 426: 1 upgrade, then 1 POST"
echo "expected: 404: 1 upgrade, then 1 POST; 426: 1 upgrade, then 1 POST"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
