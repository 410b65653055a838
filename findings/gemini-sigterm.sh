#!/usr/bin/env bash
# Gemini CLI and SIGTERM during a prompt.
#
# Version: @google/gemini-cli 0.61.0 from npm. Needs bash, node, npm, python3.
#
# A good guess: a one-shot `gemini --prompt` that SIGTERM ends while it waits for the model
# exits with 143 or another status that is not 0. It has printed no answer.
# Seen: it exits with status 0, and its stdout is empty, as if the prompt had succeeded with
# an empty answer.
#
# Where it matters: `run` exits with the command's status (docs/api.md). A status of 0 after
# a SIGTERM to this CLI is no proof of an answer.
set -euo pipefail

work=$(mktemp -d)
server=
finish() {
    if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; fi
    rm -rf "$work"
}
trap finish EXIT

mkdir -p "$work/home/.gemini" "$work/tmp"
timeout 300 npm install --prefix "$work/cli" --no-audit --no-fund --ignore-scripts \
    --loglevel=error @google/gemini-cli@0.61.0 >&2
echo '{"security":{"auth":{"selectedType":"gemini-api-key"}}}' >"$work/home/.gemini/settings.json"

# A model that never answers. It is also the proxy for every other address, so that nothing
# leaves the machine.
cat >"$work/server.py" <<'PY'
import http.server
import sys
import time

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_CONNECT(self):
        self.send_error(502)

    def do_POST(self):
        print(self.path, flush=True)
        time.sleep(120)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
with open(sys.argv[1], "w") as port:
    port.write(f"{server.server_port}\n")
server.serve_forever()
PY
python3 "$work/server.py" "$work/port" >"$work/requests" 2>/dev/null &
server=$!
for _ in $(seq 100); do if [ -s "$work/port" ]; then break; fi; sleep 0.1; done
port=$(cat "$work/port")

cd "$work/home"
# One process, so that the signal reaches the one that waits: the CLI would start itself
# a second time.
timeout 90 env -i PATH="$PATH" HOME="$work/home" TMPDIR="$work/tmp" \
    GEMINI_API_KEY=sample GOOGLE_GEMINI_BASE_URL="http://127.0.0.1:$port" \
    GEMINI_CLI_NO_RELAUNCH=true \
    HTTPS_PROXY="http://127.0.0.1:$port" NO_PROXY=127.0.0.1 \
    "$work/cli/node_modules/.bin/gemini" --skip-trust --model gemini-2.5-pro --prompt=hello \
    </dev/null >"$work/stdout" 2>/dev/null &
gemini=$!
for _ in $(seq 600); do if [ -s "$work/requests" ]; then break; fi; sleep 0.1; done
if [ ! -s "$work/requests" ]; then
    echo "CHANGED: it does not ask the model" >&2
    kill "$gemini" || true
    exit 1
fi
sleep 1
# `timeout` passes the signal on, and exits with the status of the command.
kill -TERM "$gemini"
status=0
wait "$gemini" || status=$?

seen="status $status, $(wc -c <"$work/stdout") bytes of stdout"
recorded="status 0, 0 bytes of stdout"
echo "expected: status 143, 0 bytes of stdout"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
