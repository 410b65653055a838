#!/usr/bin/env bash
# A wait of nix takes the end of a child that a real-time signal has ended, and loses it.
#
# Versions: nix 0.31.3 (crates.io). Needs bash and cargo.
#
# A good guess: `waitpid` returns how the child ended, or an error and the child can be waited
# for again. A child ends itself by signal 34 (SIGRTMIN of glibc).
# Seen: `waitpid` returns EINVAL, because its `Signal` has no real-time signals. The kernel has
# given the child up by then: the second `waitpid` returns ECHILD, and nobody learns of the end.
#
# Where it matters: a process 1 that waits so never sees the end of its command. Init waits with
# rustix (containers/init/src/supervisor.rs).
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
nix = { version = "=0.31.3", default-features = false, features = ["process"] }
TOML
cat >"$work/src/main.rs" <<'RS'
use std::process::Command;

use nix::sys::wait::waitpid;
use nix::unistd::Pid;

#[allow(clippy::zombie_processes)]
fn main() {
    let child = Command::new("sh").args(["-c", "kill -34 $$"]).spawn().unwrap();
    let pid = Pid::from_raw(child.id() as i32);
    let told = [waitpid(pid, None), waitpid(pid, None)].map(|told| match told {
        Ok(status) => format!("{status:?}"),
        Err(errno) => format!("{errno:?}"),
    });
    println!("{}", told.join(", then "));
}
RS
(cd "$work" && timeout 600 cargo build --quiet >&2)

seen=$("$work/target/debug/finding")
recorded="EINVAL, then ECHILD"
echo "expected: the signal"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
