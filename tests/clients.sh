#!/bin/bash
# Prints a folder with the clients for Node and Python as a user has them who has installed them:
# `node/node_modules` and `python/bin`. It is made in the cache, by what it has to hold.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
alone clients
need python3 "apt-get install python3"
need node "apt-get install nodejs npm (Node 20 or newer)"
need npm "apt-get install npm"

sources() {
    find clients/node clients/python proto/polydev/runtime tests/clients.sh -type f \
        -not -path '*/node_modules/*' -not -path '*/dist/*' -not -path '*/src/gen/*' \
        -not -path '*/polydev/runtime/v1/*.py*' -not -path '*/__pycache__/*' | sort
}
sum=$(sources | xargs sha256sum | sha256sum | cut --characters 1-16)
folder=$POLYDEV_CACHE/clients-$sum
if [ ! -e "$folder/complete" ]; then
    python3 -c "import ensurepip" 2>/dev/null || packages ensurepip=python3-venv
    step "installing the clients for Node and Python"
    rm -rf "$POLYDEV_CACHE"/clients-*
    mkdir -p "$folder/source" "$folder/node"
    # Away from the checkout, in which they would leave what they make.
    { sources; echo proto/buf.yaml; } | tar --create --files-from - | tar --extract --directory "$folder/source"
    npm install --prefix "$folder/source/clients/node" --no-audit --no-fund --loglevel error >&2
    npm install --prefix "$folder/node" --no-audit --no-fund --loglevel error "$folder/source/clients/node" >&2
    python3 -m venv "$folder/python"
    "$folder/python/bin/pip" install --quiet --disable-pip-version-check "$folder/source/clients/python" >&2
    touch "$folder/complete"
fi
echo "$folder"
