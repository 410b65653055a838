#!/usr/bin/env bash
# Gemini CLI and a prompt that begins like a command, in two forms of the CLI.
#
# Version: @google/gemini-cli 0.61.0 from npm. Needs bash, node, npm, python3.
#
# A good guess: a prompt means the same with `-p` and with `--acp`. `-p` sends `/memory show` and
# `$memory show` to the model, so a prompt of the Agent Client Protocol goes there too.
# Seen: with `--acp` both are commands of the CLI, also after a space. It answers by itself, and the
# model is not asked.
#
# Where it matters: proto/src/prompt.rs (`is_command_to_agent`) lets such a prompt start cold, and
# containers/agent/src/google.rs speaks the protocol.
set -euo pipefail

work=$(mktemp -d)
server=
finish() {
    if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; fi
    rm -rf "$work"
}
trap finish EXIT

mkdir -p "$work/home/.gemini" "$work/tmp" "$work/project"
echo '{"security":{"auth":{"selectedType":"gemini-api-key"}}}' >"$work/home/.gemini/settings.json"
timeout 300 npm install --prefix "$work/cli" --no-audit --no-fund --ignore-scripts \
    --loglevel=error @google/gemini-cli@0.61.0 >&2

# It is also the proxy for every other address, so that nothing leaves the machine.
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

    def do_GET(self):
        self.answer(404)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_stream = "streamGenerateContent" in self.path
        text = "sure" if is_stream else '{"complexity_reasoning":"x","complexity_score":1}'
        body = json.dumps({
            "candidates": [{"content": {"role": "model", "parts": [{"text": text}]},
                            "finishReason": "STOP", "index": 0}],
            "usageMetadata": {"promptTokenCount": 1, "totalTokenCount": 2},
        })
        if is_stream:
            parts = [part.get("text", "") for turn in request["contents"] for part in turn["parts"]]
            print("asked", "memory show" in parts[-1], flush=True)
            self.answer(200, f"data: {body}\n\n".encode(), "text/event-stream")
        else:
            self.answer(200, body.encode())

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
with open(sys.argv[1], "w") as port:
    port.write(f"{server.server_port}\n")
server.serve_forever()
PY
python3 "$work/server.py" "$work/port" >"$work/requests" 2>/dev/null &
server=$!
for _ in $(seq 100); do if [ -s "$work/port" ]; then break; fi; sleep 0.1; done
port=$(cat "$work/port")

cat >"$work/acp.py" <<'PY'
import json
import subprocess
import sys

process = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL)
number = 0

def call(method, params):
    global number
    number += 1
    line = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
    process.stdin.write(json.dumps(line).encode() + b"\n")
    process.stdin.flush()
    for line in process.stdout:
        answer = json.loads(line)
        if answer.get("id") == number and "method" not in answer:
            return answer["result"]
    sys.exit("the CLI has ended")

call("initialize", {"protocolVersion": 1, "clientCapabilities": {}})
session = call("session/new", {"cwd": ".", "mcpServers": []})["sessionId"]
for text in ["/memory show", "$memory show", " $memory show"]:
    call("session/prompt", {"sessionId": session, "prompt": [{"type": "text", "text": text}]})
process.stdin.close()
process.wait()
PY

cd "$work/project"
gemini() {
    timeout 120 env -i PATH="$PATH" HOME="$work/home" TMPDIR="$work/tmp" \
        GEMINI_API_KEY=sample GOOGLE_GEMINI_BASE_URL="http://127.0.0.1:$port" \
        GEMINI_CLI_NO_RELAUNCH=true HTTPS_PROXY="http://127.0.0.1:$port" NO_PROXY=127.0.0.1 "$@"
}
cli=(node "$work/cli/node_modules/@google/gemini-cli/bundle/gemini.js" --skip-trust)
count() { grep -c "asked True" "$work/requests" || true; }
for text in '/memory show' '$memory show' ' $memory show'; do
    gemini "${cli[@]}" "--prompt=$text" </dev/null >/dev/null 2>&1 || true
done
one_shot=$(count)
gemini python3 "$work/acp.py" "${cli[@]}" --acp
seen="three such prompts: $one_shot asked the model with -p, $(($(count) - one_shot)) with --acp"
recorded="three such prompts: 3 asked the model with -p, 0 with --acp"
echo "expected: three such prompts: 3 asked the model with -p, 3 with --acp"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
