#!/bin/sh
# Builds the runtime images and tags each with `:latest` and `:<cli version>`.
# Usage: containers/build.sh [IMAGE-FOLDER...]   (default: all runtime images)
# Skips an image if neither its folder nor its base image has changed since its build.
set -eu

DOCKER=${DOCKER:-docker}
export DOCKER
cd "$(dirname "$0")"
if [ $# -eq 0 ]; then
    set -- openai-runtime anthropic-runtime google-runtime
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Use the ordinary base if possible; without a registry, the base made from packages.
base=node:22-slim
if ! "$DOCKER" image inspect "$base" >/dev/null 2>&1 && ! timeout 300 "$DOCKER" pull --quiet "$base" >/dev/null 2>&1; then
    base=polydev-node:22-slim
    if ! "$DOCKER" image inspect "$base" >/dev/null 2>&1; then
        echo "images: node:22-slim cannot be pulled, building $base in its place"
        base/build.sh
    fi
fi
base_id=$("$DOCKER" image inspect --format '{{.Id}}' "$base")

for folder in "$@"; do
    version=$(sed -n 's/^ARG CLI_VERSION=//p' "$folder/Dockerfile" | head -n 1)
    content=$({ echo "$base_id"; find "$folder" -type f -not -path '*/extra-ca/*' | LC_ALL=C sort | xargs sha256sum; } | sha256sum | cut -c1-64)
    built=$("$DOCKER" image inspect --format '{{index .Config.Labels "dev.polydev.content"}}' "polydev-$folder:latest" 2>/dev/null || true)
    if [ "$built" = "$content" ]; then
        echo "images: polydev-$folder:$version is up to date"
        continue
    fi
    echo "images: building polydev-$folder:$version on $base (a few minutes)"
    cp -r "$folder" "$work/$folder"
    if [ -n "${NODE_EXTRA_CA_CERTS:-}" ]; then
        cp "$NODE_EXTRA_CA_CERTS" "$work/$folder/extra-ca/host.crt"
    fi
    if ! "$DOCKER" build --build-arg "BASE=$base" --label "dev.polydev.content=$content" \
        --tag "polydev-$folder:latest" --tag "polydev-$folder:$version" "$work/$folder" >"$work/$folder.log" 2>&1; then
        cat "$work/$folder.log" >&2
        echo "images: polydev-$folder did not build" >&2
        exit 1
    fi
done
