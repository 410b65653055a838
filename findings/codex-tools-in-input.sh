#!/usr/bin/env bash
# Where Codex puts the tools of a request, and what its switch for the shell leaves.
#
# Version: @openai/codex 0.171.0 from npm. Needs bash, node, npm, python3.
#
# A good guess: a request to the Responses API names its tools in `tools`, for every model, and
# without the feature `shell_tool` the model has no tool that writes files.
# Seen: with `gpt-5.1-codex` they are in `tools`. With the model that Codex chooses by itself there is
# no `tools`: they are in the first item of `input`, of the type `additional_tools`, and those that act
# are only in the description of one of them (`exec`). Without `shell_tool` that description has no
# `exec_command` any more, and still has `apply_patch`.
#
# Where it matters: proto/src/prompt.rs refuses `tools` other than `all` for Codex. Who counts or
# filters the tools of requests has to read both places.
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
    --loglevel=error @openai/codex@0.171.0 >&2

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
        case = self.path.split("/")[1]
        where = "tools" if "tools" in request else request["input"][0]["type"]
        text = json.dumps(request["input"][0])
        inner = [name for name in ("exec_command", "apply_patch") if f"### `{name}`" in text]
        print(case, where, *inner, flush=True)
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
codex() {
    local case=$1
    shift
    timeout 60 env -i PATH="$PATH" HOME="$work/home" TMPDIR="$work/tmp" CODEX_API_KEY=sample \
        HTTPS_PROXY="http://127.0.0.1:$port" NO_PROXY=127.0.0.1 \
        "$work/cli/node_modules/.bin/codex" exec --skip-git-repo-check \
        -c analytics.enabled=false -c "openai_base_url=\"http://127.0.0.1:$port/$case/v1\"" \
        "$@" hello </dev/null >/dev/null 2>&1 || true
}
codex named -m gpt-5.1-codex
codex default
codex without --disable shell_tool --disable unified_exec

seen=$(sort -u "$work/requests" | paste -s -d ';')
expected="default tools;named tools;without tools"
recorded="default additional_tools exec_command apply_patch;named tools;without additional_tools apply_patch"
echo "expected: $expected"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
