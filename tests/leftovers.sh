#!/bin/bash
# Lists what demo, test and bench make and must not leave: containers, networks,
# processes, interfaces and files, but not images, target/ and the cache.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
DOCKER=$(docker_program)

"$DOCKER" ps --all --filter label=dev.polydev.instance --format 'container {{.Names}}'
"$DOCKER" ps --all --format '{{.Image}} {{.Names}}' | sed -n 's/^polydev-.* /container /p'
"$DOCKER" network ls --filter label=dev.polydev.instance --format 'network {{.Name}}'
ip netns list | sed -n 's/^\(pdt\|pde\|pddemo\)/namespace &/p'
ip -brief link | sed -n 's/^\(pd-\|pdt\|pddemo\)/interface &/p'
iptables --list-rules 2>/dev/null | sed -n 's/^-N POLYDEV-/rules POLYDEV-/p'
pgrep --list-full --full '^/\.polydev/init|(^|/)(nomad-driver-polydev|polydev-broker|polydev-shim|stand-in)( |$)|/collector --config |/tmp/pdengine-' |
    sed 's/^[0-9]*/process/' || true
find /tmp /var/lib /run -maxdepth 1 \( -name 'polydev-*' -o -name polydev -o -name 'pdtest-*' -o -name 'pdengine-*' \) -printf 'file %p\n'
