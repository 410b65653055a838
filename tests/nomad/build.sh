#!/bin/bash
# build.sh [1.10]: prints the path of a Nomad 1.11 (or 1.10): the one in PATH, or one
# built from the Go module beside this script, which the cache keeps.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/lib.sh

version=${1:-1.11}
if command -v nomad >/dev/null && nomad version | grep -q "^Nomad v${version/./\\.}\."; then
    command -v nomad
    exit
fi
module=tests/nomad
[ "$version" = 1.11 ] || module=tests/nomad/$version
content=$(cat "$module"/go.{mod,sum} | sha256sum | cut -c1-16)
program=$POLYDEV_CACHE/nomad-$content/nomad
if [ ! -x "$program" ]; then
    need go "install Go 1.26 or newer, or put a Nomad $version into PATH"
    step "building Nomad $version (5 minutes)"
    mkdir -p "${program%/*}"
    (cd "$module" && go build -mod=mod -tags hashicorpmetrics -o "$program.partial" github.com/hashicorp/nomad) >&2
    mv "$program.partial" "$program"
fi
echo "$program"
