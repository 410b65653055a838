#!/bin/bash
# Prints a folder with Compose as `v1/docker-compose` (1.29 of Debian 12) and `v2/docker-compose`
# (2.26 of Debian 13), which are unpacked into the cache and not installed.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
alone compose

found=$POLYDEV_CACHE/compose-$(sha256sum tests/compose.sh | cut -c1-16)
if [ ! -e "$found/complete" ]; then
    packages mmdebstrap=mmdebstrap
    step "fetching Compose"
    rm -rf "$POLYDEV_CACHE"/compose-*
    mkdir -p "$found"/{v1/root,v2}
    mmdebstrap --quiet --variant=extract --include=docker-compose bookworm "$found/v1.tar" >&2
    tar --extract --file "$found/v1.tar" --directory "$found/v1/root" --wildcards \
        './usr/bin/python3*' ./usr/bin/docker-compose './usr/lib/python3*' './usr/lib/*-linux-gnu/lib*'
    # With the Python and the modules of its time.
    cat >"$found/v1/docker-compose" <<WRAPPER
#!/bin/sh
export PYTHONHOME=$found/v1/root/usr PYTHONPATH=$found/v1/root/usr/lib/python3/dist-packages
exec "\$PYTHONHOME/bin/python3.11" "\$PYTHONHOME/bin/docker-compose" "\$@"
WRAPPER
    chmod +x "$found/v1/docker-compose"
    mmdebstrap --quiet --variant=extract --include=docker-compose trixie "$found/v2.tar" >&2
    tar --extract --file "$found/v2.tar" --directory "$found/v2" --strip-components=5 \
        ./usr/libexec/docker/cli-plugins/docker-compose
    rm "$found"/v?.tar
    touch "$found/complete"
fi
echo "$found"
