#!/bin/sh
# Builds polydev-node:22-slim, a replacement for node:22-slim, only from Debian
# packages and npm packages. Usage: containers/base/build.sh
set -eu

DOCKER=${DOCKER:-docker}
DEBIAN=polydev-debian:bookworm
TAG=polydev-node:22-slim
NODE_VERSION=22.23.5
NPM_VERSION=10.9.9

here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for tool in mmdebstrap npm "$DOCKER"; do
    if ! command -v "$tool" >/dev/null; then
        echo "base: \`$tool\` is missing; on Debian or Ubuntu: apt-get install mmdebstrap npm docker.io" >&2
        exit 1
    fi
done

case $(uname -m) in
    x86_64) arch=x64 ;;
    aarch64) arch=arm64 ;;
    *) echo "base: no node package for $(uname -m)" >&2; exit 1 ;;
esac

"$here/debian.sh" "${DEBIAN#*:}" ca-certificates,curl,git

echo "base: fetching node $NODE_VERSION and npm $NPM_VERSION"
mkdir -p "$work/context/npm"
(cd "$work" && npm pack --silent "node-linux-$arch@$NODE_VERSION" "npm@$NPM_VERSION" >/dev/null)
tar -xzf "$work/node-linux-$arch-$NODE_VERSION.tgz" -C "$work" package/bin/node
mv "$work/package/bin/node" "$work/context/node"
tar -xzf "$work/npm-$NPM_VERSION.tgz" -C "$work/context/npm" --strip-components=1

echo "base: building $TAG"
cp "$here/Dockerfile" "$work/context/"
"$DOCKER" build --quiet --build-arg "DEBIAN=$DEBIAN" --tag "$TAG" "$work/context" >/dev/null
