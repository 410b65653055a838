#!/bin/bash
# Prints the path of `grpcurl`, built into the cache unless it is in PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
alone grpcurl
VERSION=1.9.3

if command -v grpcurl; then exit; fi
folder=$POLYDEV_CACHE/tools-grpcurl-$VERSION
if [ ! -x "$folder/grpcurl" ]; then
    need go "install Go 1.26 or newer, or put grpcurl into PATH"
    step "building grpcurl $VERSION"
    GOBIN=$folder go install "github.com/fullstorydev/grpcurl/cmd/grpcurl@v$VERSION" >&2
fi
echo "$folder/grpcurl"
