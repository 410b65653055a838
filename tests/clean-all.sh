#!/bin/bash
# make clean-all: removes what `make demo`, `test` and `bench` keep for next time.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh

DOCKER=$(docker_program)
images=$("$DOCKER" images --format '{{.Repository}}:{{.Tag}}' | grep '^polydev-' || true)
if [ -n "$images" ]; then
    step "removing images: ${images//$'\n'/ }"
    # shellcheck disable=SC2086
    "$DOCKER" rmi --force $images >/dev/null
fi
"$DOCKER" image prune --force --filter label=dev.polydev.stage=cli >/dev/null
step "removing target/ and what is ours in $POLYDEV_CACHE"
rm -rf target "$POLYDEV_CACHE"/{nomad,collector,compose,prometheus,tools,kernel,python,clients,uml,plugin-host,dockerd}-* "$POLYDEV_CACHE"/.*.lock
rmdir "$POLYDEV_CACHE" 2>/dev/null || true
