#!/bin/bash
# Makes the root of the machine of uml.sh, which the cache keeps, and prints its folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/lib.sh
packages linux.uml=user-mode-linux mmdebstrap=mmdebstrap mkfs.ext4=e2fsprogs

kernel=$(basename /usr/lib/uml/modules/*)
folder=$POLYDEV_CACHE/uml-$kernel-$(sha256sum tests/uml/root.sh | cut -c1-16)
if [ ! -e "$folder/made" ]; then
    step "making a Debian 13 with Docker 26 (a minute)"
    # Also those that an earlier form of this script made.
    rm -rf "$POLYDEV_CACHE"/uml-*
    mkdir -p "$folder/root"
    mmdebstrap --quiet --variant=minbase --include=docker.io,docker-cli,iptables,iproute2,kmod,busybox-static,curl \
        trixie "$folder/root.tar"
    tar --extract --file "$folder/root.tar" --directory "$folder/root" --exclude './dev/*'
    rm -rf "$folder/root.tar" "$folder/root"/usr/share/{doc,man,locale} "$folder"/root/var/lib/apt/lists/*
    mkdir -p "$folder"/root/{work,usr/lib/modules,var/lib/docker}
    cp --archive "/usr/lib/uml/modules/$kernel" "$folder/root/usr/lib/modules/"
    chroot "$folder/root" depmod "$kernel"
    # The kernel has no nftables.
    for name in iptables ip6tables; do
        chroot "$folder/root" update-alternatives --quiet --set $name "/usr/sbin/$name-legacy"
    done
    # Docker's user for `userns-remap = default`, which it cannot add where it cannot write.
    echo 'dockremap:x:990:990::/nonexistent:/usr/sbin/nologin' >>"$folder/root/etc/passwd"
    echo 'dockremap:x:990:' >>"$folder/root/etc/group"
    echo 'dockremap:200000:65536' | tee -a "$folder/root/etc/subuid" >>"$folder/root/etc/subgid"
    # The kernel gives words of its command line that it does not know to process 1.
    cat >"$folder/root/first" <<'FIRST'
#!/bin/sh
mount -t proc proc /proc
mount -t hostfs -o "$WORK" none /work
exec /work/check.sh
FIRST
    chmod 755 "$folder/root/first"
    touch "$folder/made"
fi
echo "$folder/root"
