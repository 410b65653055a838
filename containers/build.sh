#!/bin/sh
# Builds the images of slots and tags each with `:latest` and `:<version>`, for a CLI its version.
# Usage: containers/build.sh [IMAGE-FOLDER...]   (default: all images of slots)
# Skips an image if neither its folder nor its base image has changed since its build.
# `tool-gate` is the image of the gate, with the program that POLYDEV_TOOL_GATE names, or else one
# that is compiled for it.
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
# The program of the gate, static: it runs in any image.
tool_gate() {
    host=$(uname -m)-unknown-linux-gnu
    RUSTFLAGS="-C target-feature=+crt-static" \
        cargo build --locked --release --package polydev-tool-gate --target "$host" >&2
    echo "../target/$host/release/polydev-tool-gate"
}
id_of() { "$DOCKER" image inspect --format '{{.Id}}' "$1"; }

# Use the ordinary bases if possible; without a registry, those made from packages.
base=node:22-slim
if [ "$*" != tool-gate ] && ! has "$base"; then
    base=polydev-node:22-slim
    if ! "$DOCKER" image inspect "$base" >/dev/null 2>&1; then
        echo "images: node:22-slim cannot be pulled, building $base in its place"
        base/build.sh
    fi
fi
debian=debian:trixie-slim
case " $* " in *" python-sandbox "* | *" tool-gate "*) wants_debian=true ;; *) wants_debian=false ;; esac
if "$wants_debian" && ! has "$debian"; then
    debian=polydev-debian:trixie
    base/debian.sh trixie
fi

for folder in "$@"; do
    context=$work/containers/$folder
    program=
    case $folder in
        python-sandbox)
            bases="$(id_of "$base") $(id_of "$debian")"
            context=$work
            set -- --build-arg "BASE=$debian" --build-arg "NODE=$base"
            ;;
        tool-gate)
            bases=$(id_of "$debian")
            set -- --build-arg "BASE=$debian"
            program=${POLYDEV_TOOL_GATE:-}
            [ -n "$program" ] || program=$(tool_gate)
            ;;
        *)
            bases=$(id_of "$base")
            set -- --build-arg "BASE=$base"
            ;;
    esac
    version=$(sed -n -E 's/^ARG (CLI_)?VERSION=//p' "$folder/Dockerfile" | head -n 1)
    content=$({ echo "$bases"; [ -z "$program" ] || sha256sum <"$program"; find "$folder" -type f -not -path '*/extra-ca/*' | LC_ALL=C sort | xargs sha256sum; } | sha256sum | cut -c1-64)
    built=$("$DOCKER" image inspect --format '{{index .Config.Labels "dev.polydev.content"}}' "polydev-$folder:latest" 2>/dev/null || true)
    if [ "$built" = "$content" ]; then
        echo "images: polydev-$folder:$version is up to date"
        continue
    fi
    echo "images: building polydev-$folder:$version (a few minutes)"
    mkdir -p "$work/containers"
    cp -r "$folder" "$work/containers/$folder"
    if [ -n "$program" ]; then
        cp "$program" "$work/containers/$folder/polydev-tool-gate"
    elif [ -n "${NODE_EXTRA_CA_CERTS:-}" ]; then
        cp "$NODE_EXTRA_CA_CERTS" "$work/containers/$folder/extra-ca/host.crt"
    fi
    if ! "$DOCKER" build "$@" --label "dev.polydev.content=$content" --file "$work/containers/$folder/Dockerfile" \
        --tag "polydev-$folder:latest" --tag "polydev-$folder:$version" "$context" >"$work/$folder.log" 2>&1; then
        cat "$work/$folder.log" >&2
        echo "images: polydev-$folder did not build" >&2
        exit 1
    fi
done
