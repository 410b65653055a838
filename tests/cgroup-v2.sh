#!/bin/bash
# The driver's limits on a real kernel with cgroup v2: a small virtual machine, in
# software, with our own program as its init. Debian's kernel is unpacked, not installed.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
packages qemu-system-x86_64=qemu-system-x86 cpio=cpio

kernel=$(tests/kernel.sh)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/root/{proc,sys,dev}
strip -o "$work/root/init" target/debug/cgroup-v2
# Its libraries, where it looks for them.
ldd target/debug/cgroup-v2 | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "$work/root${library%/*}"
    cp --dereference "$library" "$work/root$library"
done
(cd "$work/root" && find . | cpio --quiet --create --format newc) >"$work/initramfs"

timeout 120 qemu-system-x86_64 -accel tcg -m 1024 -nographic -no-reboot \
    -kernel "$kernel" -initrd "$work/initramfs" \
    -append "console=ttyS0 quiet panic=-1 cgroup_no_v1=all" </dev/null | tee "$work/console" || true
grep -q PASSED "$work/console" || fail "the limits do not hold under cgroup v2"
