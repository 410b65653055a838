#!/bin/bash
# build.sh: prints the path of Docker Engine 29's dockerd, built from the Go module beside this
# script, which the cache keeps.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/lib.sh

export CGO_ENABLED=0
go_program dockerd tests/engine github.com/moby/moby/v2/cmd/dockerd "install Go 1.26 or newer" \
    -mod=readonly -tags exclude_graphdriver_btrfs
