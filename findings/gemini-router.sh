#!/usr/bin/env bash
# Gemini CLI: how many models see one prompt.
#
# Version: @google/gemini-cli 0.61.0 from npm. Needs bash, node, npm, python3.
#
# A good guess: a one-shot prompt that needs no tool is one request to one model.
# Seen: it is two requests, one after the other. The first sends the prompt to a smaller
# model that rates how hard it is; the second, to the model of that choice, gives the
# answer. With `--model` there is only the second request.
#
# Where it matters: without a model, a prompt waits for two models in turn and costs two
# requests of the user's quota. `Prompt.model` becomes the option
# (shim/src/provider/google.rs). A stand-in API must answer both forms of request
# (tests/stand_in/src/main.rs).
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

# It answers every prompt, and rates it as easy if that is asked. It is also the proxy for
# every other address, so that nothing leaves the machine.
cat >"$work/server.py" <<'PY'
import http.server
import json
import sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, kind="text/plain", body=b""):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self):
        self.close_connection = True
        self.answer(502)

    def do_POST(self):
        request = self.rfile.read(int(self.headers["Content-Length"]))
        case, rest = self.path[1:].split("/", 1)
        method = rest.partition(":")[2].partition("?")[0]
        knows = "with" if b"sample prompt" in request else "without"
        print(case, method, knows, "the prompt", flush=True)
        rated = {"complexity_reasoning": "short", "complexity_score": 1}
        is_stream = method == "streamGenerateContent"
        text = "hi" if is_stream else json.dumps(rated)
        answer = {
            "candidates": [
                {
                    "content": {"role": "model", "parts": [{"text": text}]},
                    "finishReason": "STOP",
                }
            ],
            "usageMetadata": {
                "promptTokenCount": 1,
                "candidatesTokenCount": 1,
                "totalTokenCount": 2,
            },
        }
        body = json.dumps(answer).encode()
        if is_stream:
            self.answer(200, "text/event-stream", b"data: " + body + b"\n\n")
        else:
            self.answer(200, "application/json", body)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
with open(sys.argv[1], "w") as port:
    port.write(f"{server.server_port}\n")
server.serve_forever()
PY
python3 "$work/server.py" "$work/port" >"$work/requests" 2>"$work/errors" &
server=$!
for _ in $(seq 100); do if [ -s "$work/port" ]; then break; fi; sleep 0.1; done
port=$(cat "$work/port")

gemini() {
    local case=$1
    shift
    timeout 90 env -i PATH="$PATH" HOME="$work/home" TMPDIR="$work/tmp" \
        GEMINI_API_KEY=sample GOOGLE_GEMINI_BASE_URL="http://127.0.0.1:$port/$case" \
        GEMINI_CLI_NO_RELAUNCH=true \
        HTTPS_PROXY="http://127.0.0.1:$port" NO_PROXY=127.0.0.1 \
        "$work/cli/node_modules/.bin/gemini" --skip-trust "$@" --prompt="sample prompt" \
        </dev/null >/dev/null 2>&1 || echo "$case failed" >>"$work/requests"
}
cd "$work/home"
gemini default
gemini named --model gemini-2.5-pro

seen=$(paste -s -d ';' "$work/requests")
recorded="default generateContent with the prompt;"
recorded+="default streamGenerateContent with the prompt;"
recorded+="named streamGenerateContent with the prompt"
echo "expected: default and named: one request each"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
