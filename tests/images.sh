#!/bin/bash
# images.sh [IMAGE-FOLDER...]: builds the images that are not up to date; what that needs is
# installed first.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
DOCKER=$(docker_program)
for base in node:22-slim debian:trixie-slim; do
    if ! "$DOCKER" image inspect "$base" >/dev/null 2>&1 && ! timeout 300 "$DOCKER" pull --quiet "$base" >/dev/null 2>&1; then
        packages mmdebstrap=mmdebstrap npm=npm
    fi
done
containers/build.sh "$@"

# A small image for plain tasks: busybox, and a user beside root.
if ! "$DOCKER" image inspect polydev-busybox:1 >/dev/null 2>&1; then
    packages busybox=busybox-static
    step "making polydev-busybox:1"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    mkdir -p "$folder"/{bin,etc,tmp,home,proc,sys,dev}
    chmod 1777 "$folder/tmp"
    cp "$(command -v busybox)" "$folder/bin/busybox"
    for applet in $("$folder/bin/busybox" --list); do
        [ "$applet" = busybox ] || ln -s busybox "$folder/bin/$applet"
    done
    echo root:x:0:0:root:/:/bin/sh >"$folder/etc/passwd"
    echo user:x:1000:1000::/home:/bin/sh >>"$folder/etc/passwd"
    printf 'root:x:0:\nuser:x:1000:\n' >"$folder/etc/group"
    tar --create --directory "$folder" . | "$DOCKER" import --change 'CMD ["sh"]' - polydev-busybox:1 >/dev/null
fi
