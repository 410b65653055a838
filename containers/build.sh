#!/bin/sh
# Builds the images of slots and tags each with `:latest` and `:<version>`, for a CLI its version.
# Usage: containers/build.sh [IMAGE-FOLDER...]   (default: all of them)
# Skips an image if neither its folder nor its base image has changed since its build.
set -eu

DOCKER=${DOCKER:-docker}
export DOCKER
cd "$(dirname "$0")"
if [ $# -eq 0 ]; then
    set -- openai-runtime anthropic-runtime google-runtime python-sandbox
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Whether an image is here or can be pulled.
has() {
    "$DOCKER" image inspect "$1" >/dev/null 2>&1 || timeout 300 "$DOCKER" pull --quiet "$1" >/dev/null 2>&1
}
id_of() { "$DOCKER" image inspect --format '{{.Id}}' "$1"; }

# Use the ordinary bases if possible; without a registry, those made from packages.
base=node:22-slim
if ! has "$base"; then
    base=polydev-node:22-slim
    if ! "$DOCKER" image inspect "$base" >/dev/null 2>&1; then
        echo "images: node:22-slim cannot be pulled, building $base in its place"
        base/build.sh
    fi
fi
debian=debian:trixie-slim
case " $* " in *" python-sandbox "*) wants_debian=true ;; *) wants_debian=false ;; esac
if "$wants_debian" && ! has "$debian"; then
    debian=polydev-debian:trixie
    base/debian.sh trixie
fi

for folder in "$@"; do
    bases=$(id_of "$base")
    context=$work/containers/$folder
    set -- --build-arg "BASE=$base"
    if [ "$folder" = python-sandbox ]; then
        bases="$bases $(id_of "$debian")"
        context=$work
        set -- --build-arg "BASE=$debian" --build-arg "NODE=$base"
    fi
    version=$(sed -n -E 's/^ARG (CLI_)?VERSION=//p' "$folder/Dockerfile" | head -n 1)
    content=$({ echo "$bases"; find "$folder" -type f -not -path '*/extra-ca/*' | LC_ALL=C sort | xargs sha256sum; } | sha256sum | cut -c1-64)
    built=$("$DOCKER" image inspect --format '{{index .Config.Labels "dev.polydev.content"}}' "polydev-$folder:latest" 2>/dev/null || true)
    if [ "$built" = "$content" ]; then
        echo "images: polydev-$folder:$version is up to date"
        continue
    fi
    echo "images: building polydev-$folder:$version (a few minutes)"
    mkdir -p "$work/containers"
    cp -r "$folder" "$work/containers/$folder"
    if [ -n "${NODE_EXTRA_CA_CERTS:-}" ]; then
        cp "$NODE_EXTRA_CA_CERTS" "$work/containers/$folder/extra-ca/host.crt"
    fi
    if ! "$DOCKER" build "$@" --label "dev.polydev.content=$content" --file "$work/containers/$folder/Dockerfile" \
        --tag "polydev-$folder:latest" --tag "polydev-$folder:$version" "$context" >"$work/$folder.log" 2>&1; then
        cat "$work/$folder.log" >&2
        echo "images: polydev-$folder did not build" >&2
        exit 1
    fi
done
