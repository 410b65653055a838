#!/usr/bin/env bash
# A tonic server, and a caller that cancels its call instead of closing its side.
#
# Versions: tonic and tonic-prost 0.14.9 (crates.io), grpcio 1.85.1 (PyPI). Needs bash,
# cargo, python3.
#
# A good guess: a task of the server that reads a client's stream sees the end of the stream,
# `Ok(None)`, only if the client has closed its side. If the client cancels the call, the
# task sees an error with the code `Cancelled`.
# Seen: `Streaming::message` gives `Ok(None)` in both cases. What the client sent until it
# cancelled looks complete.
#
# Where it matters: a run's stdin ends when its caller closes its side, and stays open when
# the caller is gone, which may attach again. The shim therefore passes an end on only
# after a moment, if the call is still there (`CLOSE_TIMEOUT` in shim/src/run/relay.rs).
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
    grpcio==1.85.1 >&2

mkdir -p "$work/server/src"
cat >"$work/server/Cargo.toml" <<'TOML'
[package]
name = "finding"
version = "0.0.0"
edition = "2021"

[dependencies]
http = "1"
tokio = { version = "1", features = ["macros", "net", "rt"] }
tokio-stream = { version = "0.1", features = ["net"] }
tonic = { version = "=0.14.9", default-features = false, features = ["router", "server"] }
tonic-prost = "=0.14.9"
tower = { version = "0.5", features = ["util"] }
TOML
cat >"$work/server/src/main.rs" <<'RS'
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::{Request, Response, Status, Streaming};

/// `/finding.Finding/CASE`, for any case: reads a stream of empty messages to its end.
#[derive(Clone)]
struct Finding;

async fn read(case: String, mut messages: Streaming<()>) {
    let mut count = 0;
    let end = loop {
        match messages.message().await {
            Ok(Some(())) => count += 1,
            Ok(None) => break "Ok(None)".to_owned(),
            Err(status) => break format!("Err({:?})", status.code()),
        }
    };
    println!("{case}: {count} message, {end}");
}

impl tower::Service<http::Request<Body>> for Finding {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let case = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        Box::pin(async move {
            let method = tower::service_fn(move |request: Request<Streaming<()>>| {
                // A task of its own, which the end of the call does not end.
                let reader = tokio::spawn(read(case.clone(), request.into_inner()));
                async move {
                    reader.await.map_err(|error| Status::internal(error.to_string()))?;
                    Ok::<_, Status>(Response::new(()))
                }
            });
            let codec = tonic_prost::ProstCodec::<(), ()>::default();
            Ok(tonic::server::Grpc::new(codec).client_streaming(method, request).await)
        })
    }
}

impl tonic::server::NamedService for Finding {
    const NAME: &'static str = "finding.Finding";
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("port {}", listener.local_addr()?.port());
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let mut server = tonic::transport::Server::builder();
    server.add_service(Finding).serve_with_incoming(incoming).await?;
    Ok(())
}
RS
(cd "$work/server" && CARGO_TARGET_DIR="$work/target" timeout 600 cargo build --quiet >&2)
"$work/target/debug/finding" >"$work/seen" &
server=$!
for _ in $(seq 100); do if [ -s "$work/seen" ]; then break; fi; sleep 0.1; done
port=$(sed -n 's/^port //p' "$work/seen")

cat >"$work/call.py" <<'PY'
import os
import sys
import threading
import time

import grpc

port, case = sys.argv[1:]
closes = threading.Event()

def messages():
    yield b""
    closes.wait()

channel = grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)])
method = channel.stream_unary(
    f"/finding.Finding/{case}", lambda message: message, lambda data: data
)
call = method.future(messages())
time.sleep(2)
if case == "closed":
    closes.set()
    call.result(10)
else:
    call.cancel()
    time.sleep(2)
os._exit(0)
PY
for case in closed cancelled; do
    timeout 60 "$work/python/bin/python" "$work/call.py" "$port" "$case"
done
for _ in $(seq 50); do if grep -q '^cancelled' "$work/seen"; then break; fi; sleep 0.1; done

seen=$(grep -v '^port' "$work/seen" | paste -s -d ';')
recorded="closed: 1 message, Ok(None);cancelled: 1 message, Ok(None)"
echo "expected: closed: 1 message, Ok(None);cancelled: 1 message, Err(Cancelled)"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
