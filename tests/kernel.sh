#!/bin/bash
# Prints the path of a kernel for virtual machines: Debian's, unpacked and not installed.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh

folder=$POLYDEV_CACHE/kernel-cloud
if [ ! -e "$folder/vmlinuz" ]; then
    step "fetching a kernel"
    need apt-get "put a kernel with cgroup v2 at $folder/vmlinuz"
    rm -rf "$folder.partial" && mkdir -p "$folder.partial"
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^  Depends: \(linux-image-.*\)$/\1/p' | head -1)
    [ -n "$package" ] || fail "no package linux-image-cloud-amd64"
    (cd "$folder.partial" && apt-get download -qq "$package" && dpkg-deb --extract ./*.deb root) >&2
    cp "$folder.partial"/root/boot/vmlinuz-* "$folder.partial/vmlinuz"
    rm -rf "$folder.partial"/root "$folder.partial"/*.deb "$folder"
    mv "$folder.partial" "$folder"
fi
echo "$folder/vmlinuz"
