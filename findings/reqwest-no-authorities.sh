#!/usr/bin/env bash
# reqwest on a machine that has no certificates of authorities.
#
# Versions: reqwest 0.13.5 with the feature `rustls-no-provider`, rustls 0.23.36 with ring
# (crates.io). Needs bash, cargo, python3, a C compiler.
#
# A good guess: a client that asks `http://` addresses alone needs no authorities. It is built,
# and only a request to `https://` fails on a machine without any.
# Seen: the client is not built ("No CA certificates were loaded from the system"), so nothing
# can be asked, http neither. With a list of trusted certificates of its own, also an empty one,
# the client is built and asks `http://`. Images without the package `ca-certificates` are such
# machines.
#
# Where it matters: shim/src/nomad/settings.rs, whose Nomad is at http://127.0.0.1:4646.
set -euo pipefail

work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$work"' EXIT

mkdir "$work/src"
cat >"$work/Cargo.toml" <<'TOML'
[package]
name = "finding"
version = "0.0.0"
edition = "2024"

[dependencies]
reqwest = { version = "=0.13.5", default-features = false, features = ["rustls-no-provider"] }
rustls = { version = "=0.23.36", default-features = false, features = ["ring", "std"] }
tokio = { version = "1", features = ["macros", "rt", "net", "time"] }
TOML
cat >"$work/src/main.rs" <<'RS'
#[tokio::main(flavor = "current_thread")]
async fn main() {
    rustls::crypto::ring::default_provider().install_default().unwrap();
    let url = std::env::args().nth(1).unwrap();
    let builder = || reqwest::Client::builder().no_proxy();
    for (name, builder) in [("default", builder()), ("none", builder().tls_certs_only([]))] {
        let answer = match builder.build() {
            Ok(client) => match client.get(&url).send().await {
                Ok(answer) => answer.status().as_u16().to_string(),
                Err(_) => "no answer".into(),
            },
            Err(_) => "no client".into(),
        };
        println!("{name}: {answer}");
    }
}
RS
(cd "$work" && timeout 900 cargo build --quiet >&2)

mkdir "$work/www"
(cd "$work/www" && exec python3 -u -m http.server 0 --bind 127.0.0.1) >"$work/port" 2>&1 &
server=$!
for _ in $(seq 100); do
    port=$(sed -n 's/.* port \([0-9]*\) .*/\1/p' "$work/port")
    [ -n "$port" ] && break
    sleep 0.1
done

# As in an image without authorities, whatever this machine has.
mkdir "$work/none"
seen=$(SSL_CERT_FILE=$work/none/file SSL_CERT_DIR=$work/none timeout 60 "$work/target/debug/finding" "http://127.0.0.1:$port/" | paste -sd, | sed 's/,/, /')

recorded="default: no client, none: 200"
echo "expected: default: 200, none: 200"
echo "seen: $seen"
[ "$seen" = "$recorded" ] || { echo "CHANGED: recorded was $recorded"; exit 1; }
