#!/bin/bash
# Prints the path of a Nomad 1.11: the one in PATH, or one built from the Go module
# beside this script, which the cache keeps.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/lib.sh

if command -v nomad >/dev/null && nomad version | grep -q '^Nomad v1\.11\.'; then
    command -v nomad
    exit
fi
content=$(cat tests/nomad/go.mod tests/nomad/go.sum | sha256sum | cut -c1-16)
program=$POLYDEV_CACHE/nomad-$content/nomad
if [ ! -x "$program" ]; then
    need go "install Go 1.26 or newer, or put a Nomad 1.11 into PATH"
    step "building Nomad (5 minutes)"
    mkdir -p "${program%/*}"
    (cd tests/nomad && go build -mod=mod -tags hashicorpmetrics -o "$program.partial" github.com/hashicorp/nomad) >&2
    mv "$program.partial" "$program"
fi
echo "$program"
