#!/usr/bin/env bash
# Codex CLI with its prompt as an argument and a stdin that stays open.
#
# Version: @openai/codex 0.169.0 from npm. Needs bash, node, npm, python3.
#
# A good guess: `codex exec PROMPT` has its prompt, so it asks the model at once, whatever
# its stdin is.
# Seen: if stdin is a pipe, Codex reads it to its end before the first model request, and
# adds what it reads to the prompt. As long as the writer keeps the pipe open, no request
# is made. With `</dev/null` the same command asks at once.
#
# Where it matters: a service that runs the CLI gets no answer until it closes the
# command's stdin. `RunStart` says whether a run has a stdin, and `run --prompt` gives it
# none (shim/cli/src/run.rs).
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

# It notes whether stdin had ended when the model was asked. It is also the proxy for every
# other address, so that nothing leaves the machine.
cat >"$work/server.py" <<'PY'
import http.server
import os
import sys

work = sys.argv[1]

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
        self.answer(426)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        form = self.path.split("/")[1]
        ended = os.path.exists(f"{work}/ended")
        print(form, "asks", "after" if ended else "before", "the end of stdin", flush=True)
        self.answer(400)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
with open(f"{work}/port", "w") as port:
    port.write(f"{server.server_port}\n")
server.serve_forever()
PY
python3 "$work/server.py" "$work" >"$work/requests" 2>/dev/null &
server=$!
for _ in $(seq 100); do if [ -s "$work/port" ]; then break; fi; sleep 0.1; done
port=$(cat "$work/port")

# Codex fails in the end, because the POST is answered with an error.
codex() {
    timeout 60 env -i PATH="$PATH" HOME="$work/home" TMPDIR="$work/tmp" CODEX_API_KEY=sample \
        HTTPS_PROXY="http://127.0.0.1:$port" NO_PROXY=127.0.0.1 \
        "$work/cli/node_modules/.bin/codex" exec --skip-git-repo-check \
        -c analytics.enabled=false -c "openai_base_url=\"http://127.0.0.1:$port/$1/v1\"" \
        hello >/dev/null 2>&1 || true
}

cd "$work/home"
# The pipe stays open for ten seconds longer than the whole command takes without one.
started=$SECONDS
codex null </dev/null
{ sleep $((SECONDS - started + 10)); touch "$work/ended"; } | codex pipe

seen=$(paste -s -d ';' "$work/requests")
recorded="null asks before the end of stdin;pipe asks after the end of stdin"
echo "expected: null asks before the end of stdin;pipe asks before the end of stdin"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
