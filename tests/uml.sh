#!/bin/bash
# uml.sh [26|29|ipv6|userns]: the built programs on a machine of today with cgroup v2. It has
# Docker 26, also with the settings for IPv6 or for user namespaces that old daemons have, or
# Engine 29 with its image store.
#
# It is Debian 13 in user-mode Linux, which needs no hardware for it. It has one processor, and
# its system calls are some ten times slower: it shows what holds, not how fast. Its root is a
# folder of the cache, which it cannot write to.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
POLYDEV_BIN=${POLYDEV_BIN:-$PWD/target/under-test}
: "${POLYDEV_NOMAD:=$(tests/nomad/build.sh)}"
machine=${1:-26}
case $machine in
    26 | 29) settings='{}' ;;
    ipv6) settings='{ "ipv6": true, "fixed-cidr-v6": "fd00:7::/64", "ip6tables": true, "experimental": true }' ;;
    userns) settings='{ "userns-remap": "default" }' ;;
    *) fail "no machine \`$machine\`: 26, 29, ipv6 or userns" ;;
esac
packages linux.uml=user-mode-linux mkfs.ext4=e2fsprogs
root=$(tests/uml/root.sh)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin"
for program in polydev-shim nomad-driver-polydev polydev-init polydev-broker; do
    strip -o "$work/bin/$program" "$POLYDEV_BIN/$program"
done
cp "$POLYDEV_NOMAD" "$work/bin/nomad"
cp tests/uml/check.sh jobspecs/pool-anthropic.nomad.hcl "$work/bin/"
# It is found before the one of Debian.
[ "$machine" != 29 ] || cp "$(tests/engine/build.sh)" "$work/bin/dockerd"
echo "$settings" >"$work/bin/daemon.json"
echo "$machine" >"$work/bin/machine"
truncate --size 3G "$work/disk"
mkfs.ext4 -q -F "$work/disk"

timeout 600 linux.uml mem=2G quiet root=/dev/root rootfstype=hostfs "rootflags=$root" ro \
    init=/first WORK="$work/bin" ubd0="$work/disk" con=null con0=fd:0,fd:1 </dev/null 2>&1 | tee "$work/console" || true
grep -q PASSED "$work/console" || fail "something does not hold with cgroup v2 and the Docker of machine \`$machine\`"
