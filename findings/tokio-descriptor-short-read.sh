#!/usr/bin/env bash
# tokio reads a unix stream socket on which a file descriptor has come with some of the bytes.
#
# Versions: tokio 1.54.1, rustix 1.1.6 (crates.io). Needs bash and cargo.
#
# A good guess: `AsyncReadExt::read` and `UnixStream::try_read` give the same bytes. Two messages
# wait in the socket; two reads return them.
# Seen: the kernel ends a read where the bytes with a descriptor end. `read` takes the short
# read for the end of what waits, and the second one returns nothing until more comes.
# `try_read` after `readable` returns the second message at once.
#
# Where it matters: driver and broker, and driver and init, send listening sockets over their
# connection. What may come with one is therefore read with `recvmsg` (proto/src/descriptors.rs).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir -p "$work/src"
cat >"$work/Cargo.toml" <<'TOML'
[package]
name = "finding"
version = "0.0.0"
edition = "2021"

[dependencies]
rustix = { version = "=1.1.6", features = ["net"] }
tokio = { version = "=1.54.1", features = ["io-util", "macros", "net", "rt", "time"] }
TOML
cat >"$work/src/main.rs" <<'RS'
use std::io::{stdin, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Two messages, the first with a descriptor.
fn send(stream: &UnixStream) {
    let input = stdin();
    let descriptors = [input.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut with = SendAncillaryBuffer::new(&mut space);
    with.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(stream, &[IoSlice::new(b"one")], &mut with, SendFlags::empty()).unwrap();
    stream.try_write(b"two").unwrap();
}

async fn by_read(stream: &mut UnixStream) -> String {
    let mut bytes = [0; 64];
    match timeout(Duration::from_secs(2), stream.read(&mut bytes)).await {
        Ok(count) => String::from_utf8_lossy(&bytes[..count.unwrap()]).into(),
        Err(_) => "nothing".into(),
    }
}

async fn by_try_read(stream: &mut UnixStream) -> String {
    let mut bytes = [0; 64];
    match timeout(Duration::from_secs(2), stream.readable()).await {
        Ok(_) => {
            let count = stream.try_read(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes[..count]).into()
        }
        Err(_) => "nothing".into(),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let (one, mut other) = UnixStream::pair().unwrap();
    send(&one);
    let read = [by_read(&mut other).await, by_read(&mut other).await];
    let (one, mut other) = UnixStream::pair().unwrap();
    send(&one);
    let tried = [by_try_read(&mut other).await, by_try_read(&mut other).await];
    println!("read: {}; try_read: {}", read.join(", "), tried.join(", "));
}
RS
(cd "$work" && timeout 600 cargo build --quiet >&2)

seen=$("$work/target/debug/finding" </dev/null)
recorded="read: one, nothing; try_read: one, two"
echo "expected: read: one, two; try_read: one, two"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
