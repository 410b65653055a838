#!/bin/bash
# Fails if demo, test or bench left a container, network, process, interface or file
# besides images, target/ and the cache.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
DOCKER=$(docker_program)

left=$(
    "$DOCKER" ps --all --filter label=dev.polydev.instance --format 'container {{.Names}}'
    "$DOCKER" ps --all --format '{{.Image}} {{.Names}}' | sed -n 's/^polydev-.* /container /p'
    "$DOCKER" network ls --filter label=dev.polydev.instance --format 'network {{.Name}}'
    ip netns list | sed -n 's/^\(pdt\|pddemo\)/namespace &/p'
    ip -brief link | sed -n 's/^\(pd-\|pdt\|pddemo\)/interface &/p'
    pgrep --list-name '^(nomad-driver-po|polydev-shim|polydev-init|stand-in)' | sed 's/^/process /' || true
    ls -d /tmp/pd[A-Za-z0-9]* /tmp/pdn* /tmp/polydev-* /var/lib/polydev-dev /run/polydev 2>/dev/null | sed 's/^/file /' || true
)
if [ -n "$left" ]; then
    printf 'left behind:\n%s\n' "$left" >&2
    exit 1
fi
