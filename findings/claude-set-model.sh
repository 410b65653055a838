#!/usr/bin/env bash
# Claude Code and a model that is chosen after its start.
#
# Version: @anthropic-ai/claude-code 2.1.332 from npm. Needs bash, node, npm, python3.
#
# A good guess: `set_model` of the stream-json protocol sets a value, and the next prompt goes to
# that model, as with --model at the start: one request for one prompt in both cases.
# Seen: the CLI first sends a request of its own to the new model, with `max_tokens` 1, and waits for
# the answer.
#
# Where it matters: containers/agent/src/anthropic.rs sets the model of a prompt so; the request is
# billed to the user and counts in their budget.
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
    --loglevel=error @anthropic-ai/claude-code@2.1.332 >&2

# The first part of the path names the case. It is also the proxy for every other address.
cat >"$work/server.py" <<'PY'
import http.server
import json
import sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
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
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print(self.path.split("/")[1], "small" if request["max_tokens"] == 1 else "prompt", flush=True)
        usage = {"input_tokens": 1, "output_tokens": 1}
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "sample",
                   "content": [{"type": "text", "text": "sure"}], "stop_reason": "end_turn",
                   "stop_sequence": None, "usage": usage}
        if not request.get("stream"):
            return self.answer(200, json.dumps(message).encode())
        steps = [
            ("message_start", {"message": dict(message, content=[], stop_reason=None)}),
            ("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
            ("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": "sure"}}),
            ("content_block_stop", {"index": 0}),
            ("message_delta", {"delta": {"stop_reason": "end_turn"}, "usage": usage}),
            ("message_stop", {}),
        ]
        events = (f"event: {name}\ndata: {json.dumps(dict(data, type=name))}\n\n" for name, data in steps)
        self.answer(200, "".join(events).encode(), "text/event-stream")

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
with open(sys.argv[1], "w") as port:
    port.write(f"{server.server_port}\n")
server.serve_forever()
PY
python3 "$work/server.py" "$work/port" >"$work/requests" 2>/dev/null &
server=$!
for _ in $(seq 100); do if [ -s "$work/port" ]; then break; fi; sleep 0.1; done
port=$(cat "$work/port")

cat >"$work/late.py" <<'PY'
import json
import subprocess
import sys

process = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL)

def send(line):
    process.stdin.write(json.dumps(line).encode() + b"\n")
    process.stdin.flush()

def wait(kind):
    for line in process.stdout:
        if json.loads(line)["type"] == kind:
            return
    sys.exit("the CLI has ended")

def control(name, request):
    send({"type": "control_request", "request_id": name, "request": request})
    wait("control_response")

control("1", {"subtype": "initialize"})
control("2", {"subtype": "set_model", "model": "claude-haiku-4-5"})
send({"type": "user", "message": {"role": "user", "content": "hello"},
      "parent_tool_use_id": None, "session_id": ""})
wait("result")
process.stdin.close()
process.wait()
PY

cd "$work/home"
claude() {
    local case=$1
    shift
    timeout 120 env -i PATH="$PATH" HOME="$work/home" TMPDIR="$work/tmp" \
        ANTHROPIC_API_KEY=sample ANTHROPIC_BASE_URL="http://127.0.0.1:$port/$case" \
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 \
        HTTPS_PROXY="http://127.0.0.1:$port" NO_PROXY=127.0.0.1 "$@"
}
cli=(node "$work/cli/node_modules/@anthropic-ai/claude-code/cli-wrapper.cjs" -p)
claude start "${cli[@]}" --model claude-haiku-4-5 hello </dev/null >/dev/null
claude late python3 "$work/late.py" "${cli[@]}" --input-format stream-json \
    --output-format stream-json --verbose

count() { grep -c "^$1 $2\$" "$work/requests" || true; }
seen="at the start: $(count start prompt) and $(count start small) small; later: $(count late prompt) and $(count late small) small"
recorded="at the start: 1 and 0 small; later: 1 and 1 small"
echo "expected: at the start: 1 and 0 small; later: 1 and 0 small"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
