#!/bin/sh
# Makes an image of a Debian suite from its packages, for hosts that cannot reach a container
# registry. Usage: containers/base/debian.sh SUITE [PACKAGE,...]
set -eu

DOCKER=${DOCKER:-docker}
tag=polydev-debian:$1
if "$DOCKER" image inspect "$tag" >/dev/null 2>&1; then
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "base: making a Debian root file system, $1 (about a minute)"
mmdebstrap --quiet --variant=minbase ${2:+--include="$2"} "$1" "$work/debian.tar"
"$DOCKER" import "$work/debian.tar" "$tag" >/dev/null
