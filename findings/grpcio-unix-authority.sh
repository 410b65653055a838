#!/usr/bin/env bash
# gRPC clients on a unix socket, and what they send as `:authority`.
#
# Versions: grpcio 1.85.1 and h2 4.4.1 (Python, PyPI), @grpc/grpc-js 1.14.3 (npm),
# h2 0.4.20 (Rust, crates.io). Needs bash, cargo, node, npm, python3.
#
# A good guess: a unix socket has no host name, so every client sends the same placeholder
# for `unix:///PATH`, and every HTTP/2 server accepts it.
# Seen: grpc-js sends `localhost`. grpcio (gRPC's C++ core) sends the socket's path without
# its first slash, percent-encoded. The Rust library h2, on which hyper and tonic stand,
# takes this for a malformed authority and resets the stream before any service sees the
# request. The caller gets INTERNAL, and no word about the authority. With the channel
# option `grpc.default_authority` the call arrives.
#
# Where it matters: clients/python/src/polydev/_client.py sets the option, and docs/api.md
# names it for other clients made with the C++ core.
set -euo pipefail

work=$(mktemp -d)
server=
finish() {
    if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; fi
    rm -rf "$work"
}
trap finish EXIT

python3 -m venv "$work/python"
timeout 300 "$work/python/bin/pip" install --quiet --disable-pip-version-check \
    grpcio==1.85.1 h2==4.4.1 >&2
timeout 300 npm install --prefix "$work/node" --no-audit --no-fund --ignore-scripts \
    --loglevel=error @grpc/grpc-js@1.14.3 >&2

mkdir -p "$work/server/src"
cat >"$work/server/Cargo.toml" <<'TOML'
[package]
name = "finding"
version = "0.0.0"
edition = "2021"

[dependencies]
h2 = "=0.4.20"
http = "1"
tokio = { version = "1", features = ["macros", "net", "rt"] }
TOML
# A service without methods: it answers every request that it sees with UNIMPLEMENTED.
cat >"$work/server/src/main.rs" <<'RS'
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("no path")?;
    let listener = tokio::net::UnixListener::bind(path)?;
    loop {
        let (socket, _) = listener.accept().await?;
        let mut connection = h2::server::handshake(socket).await?;
        while let Some(Ok((_, mut answer))) = connection.accept().await {
            let head = http::Response::builder()
                .header("content-type", "application/grpc")
                .header("grpc-status", "12");
            answer.send_response(head.body(())?, true)?;
        }
    }
}
RS
(cd "$work/server" && CARGO_TARGET_DIR="$work/target" timeout 600 cargo build --quiet >&2)

# A server that accepts any authority and prints it.
cat >"$work/print.py" <<'PY'
import socket
import sys

import h2.config
import h2.connection
import h2.events

listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
while True:
    peer, _ = listener.accept()
    config = h2.config.H2Configuration(
        client_side=False, header_encoding="utf-8", validate_inbound_headers=False
    )
    connection = h2.connection.H2Connection(config)
    connection.initiate_connection()
    peer.sendall(connection.data_to_send())
    while data := peer.recv(65536):
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                print(dict(event.headers)[":authority"], flush=True)
                answer = [
                    (":status", "200"),
                    ("content-type", "application/grpc"),
                    ("grpc-status", "12"),
                ]
                connection.send_headers(event.stream_id, answer, end_stream=True)
        peer.sendall(connection.data_to_send())
PY

cat >"$work/call.py" <<'PY'
import sys

import grpc

options = [("grpc.default_authority", name) for name in sys.argv[2:]]
with grpc.insecure_channel(f"unix://{sys.argv[1]}", options) as channel:
    method = channel.unary_unary("/a.A/B", lambda message: message, lambda data: data)
    try:
        method(b"", timeout=20)
    except grpc.RpcError as error:
        print(error.code().name)
PY
cat >"$work/node/call.js" <<'JS'
const grpc = require("@grpc/grpc-js");
const client = new grpc.Client(`unix://${process.argv[2]}`, grpc.credentials.createInsecure());
const same = (value) => value;
const options = { deadline: Date.now() + 20000 };
client.makeUnaryRequest("/a.A/B", same, same, Buffer.alloc(0), options, (error) => {
    console.log(grpc.status[error.code]);
    client.close();
});
JS

start() {
    "$@" &
    server=$!
    for _ in $(seq 100); do if [ -S "$socket" ]; then return; fi; sleep 0.1; done
    echo "the server does not listen" >&2
    exit 1
}
call() {
    timeout 30 env -u http_proxy -u grpc_proxy "$work/python/bin/python" "$work/call.py" "$@"
}

socket=$work/print.sock
start "$work/python/bin/python" "$work/print.py" "$socket" >"$work/authorities"
call "$socket" >/dev/null
timeout 30 node "$work/node/call.js" "$socket" >/dev/null
kill "$server"
# The path of the temporary folder is another one each time.
slash=%2F
encoded=${socket#/}
encoded=${encoded//\//$slash}
sent=$(sed "s|^$encoded\$|the encoded path|" "$work/authorities" | paste -s -d ,)

socket=$work/h2.sock
start "$work/target/debug/finding" "$socket"
answers=$(call "$socket"),$(call "$socket" localhost),$(timeout 30 node "$work/node/call.js" "$socket")

# In this order: grpcio, grpc-js; then from h2: grpcio, grpcio with the option, grpc-js.
seen="sent $sent; answered $answers"
recorded="sent the encoded path,localhost; answered INTERNAL,UNIMPLEMENTED,UNIMPLEMENTED"
echo "expected: sent localhost,localhost; answered UNIMPLEMENTED,UNIMPLEMENTED,UNIMPLEMENTED"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
