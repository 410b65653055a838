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
go_program nomad "$module" github.com/hashicorp/nomad "install Go 1.26 or newer, or put a Nomad $version into PATH" \
    -mod=mod -tags hashicorpmetrics
