#!/bin/bash
# Prints a folder with the `buf` and `cargo-deny` that `make test` wants: installed
# into the cache unless they are in PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
BUF=1.57.0
DENY=0.18.9

folder=$POLYDEV_CACHE/tools-buf-$BUF-deny-$DENY
mkdir -p "$folder/bin"
if ! command -v buf >/dev/null && [ ! -x "$folder/bin/buf" ]; then
    if command -v npm >/dev/null; then
        step "installing buf $BUF"
        npm install --silent --no-audit --no-fund --prefix "$folder/buf" "@bufbuild/buf@$BUF" >&2
        ln -sf ../buf/node_modules/.bin/buf "$folder/bin/buf"
    else
        need go "install npm or Go, or put buf into PATH"
        step "building buf $BUF"
        GOBIN="$folder/bin" go install "github.com/bufbuild/buf/cmd/buf@v$BUF" >&2
    fi
fi
if ! command -v cargo-deny >/dev/null && [ ! -x "$folder/bin/cargo-deny" ]; then
    step "building cargo-deny $DENY (5 minutes)"
    cargo install --quiet --locked --version "$DENY" --root "$folder" cargo-deny >&2
fi
echo "$folder/bin"
