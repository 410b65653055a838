#!/bin/bash
# Prints a folder with the Python programs that tests use. They are in a virtual environment in
# the cache, whose name depends on their versions.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
alone python
need python3 "apt-get install python3"

sum=$(sha256sum tests/python/requirements.txt | cut --characters 1-16)
folder=$POLYDEV_CACHE/python-$sum
if [ ! -e "$folder/complete" ]; then
    python3 -c "import ensurepip" 2>/dev/null || packages ensurepip=python3-venv
    step "installing Python packages"
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --requirement tests/python/requirements.txt >&2
    touch "$folder/complete"
fi
echo "$folder/bin"
