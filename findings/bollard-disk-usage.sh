#!/usr/bin/env bash
# bollard and the disk usage of Docker before API 1.52.
#
# Version: bollard 0.21.1 (crates.io). Needs bash, cargo.
#
# A good guess: `Docker::df` of a client that has negotiated an older API version returns what a daemon
# of that version says: the size of all layers, and the images with their sizes.
# Seen: the call succeeds, and everything in its result is `None`. The answer of a daemon with API 1.41
# to 1.51 has `LayersSize` and `Images` at its top; the result has only the fields of API 1.52
# (`ImageUsage` and so on), and what it does not know is skipped without an error.
#
# Where it matters: driver/src/docker/image.rs lists images with `shared-size` instead, so that
# `polydev-shim images` does not show an empty disk on Docker 20.10 to 28.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/src"
cat >"$work/Cargo.toml" <<'TOML'
[package]
name = "finding"
version = "0.0.0"
edition = "2021"

[dependencies]
bollard = { version = "=0.21.1", default-features = false, features = ["http", "pipe"] }
serde_json = "1"
tokio = { version = "1", features = ["io-util", "macros", "net", "rt"] }
TOML
cat >"$work/src/main.rs" <<'RS'
use bollard::{query_parameters::DataUsageOptions, Docker};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
};

/// What a daemon with API 1.41 answers, shortened.
const USAGE: &str = r#"{"LayersSize":1092588,"Images":[{"Id":"sha256:01","ParentId":"",
"RepoTags":["busybox:latest"],"RepoDigests":[],"Created":1466724217,"Size":1092588,"SharedSize":0,
"Labels":{},"Containers":1}],"Containers":[],"Volumes":[],"BuildCache":[]}"#;
const VERSION: &str = r#"{"Version":"20.10.24","ApiVersion":"1.41","MinAPIVersion":"1.12"}"#;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let socket = std::env::args().nth(1).expect("no socket");
    let listener = UnixListener::bind(&socket).expect("cannot listen");
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.expect("cannot accept");
            let mut head = vec![0; 4096];
            let count = stream.read(&mut head).await.expect("no request");
            let head = String::from_utf8_lossy(&head[..count]).into_owned();
            let body = if head.contains("/system/df") { USAGE } else { VERSION };
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
            stream.write_all(answer.as_bytes()).await.expect("cannot answer");
        }
    });
    let docker = Docker::connect_with_unix(&socket, 5, bollard::API_DEFAULT_VERSION);
    let docker = docker.expect("no client").negotiate_version().await.expect("no version");
    let usage = docker.df(None::<DataUsageOptions>).await.expect("an error");
    println!("{}", serde_json::to_string(&usage).expect("no JSON"));
}
RS
(cd "$work" && timeout 600 cargo build --quiet >&2)
seen=$(timeout 30 "$work/target/debug/finding" "$work/docker.sock")
recorded='{}'
echo "expected: the size of the layers, 1092588, and one image"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
