#!/bin/bash
# The shim under a real systemd, by the unit of docs/: a small virtual machine, in software, with
# Debian's systemd.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
POLYDEV_BIN=${POLYDEV_BIN:-$PWD/target/under-test}
packages qemu-system-x86_64=qemu-system-x86 cpio=cpio mmdebstrap=mmdebstrap
kernel=$(tests/kernel.sh)

folder=$POLYDEV_CACHE/systemd-1
if [ ! -e "$folder/root.tar" ]; then
    step "making a Debian with systemd"
    mkdir -p "$folder"
    # The same release as this machine's, so that the program finds its libraries.
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mmdebstrap --quiet --variant=minbase --include=systemd,curl,procps "$release" "$folder/partial.tar"
    mv "$folder/partial.tar" "$folder/root.tar"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir "$root"
tar --extract --file "$folder/root.tar" --directory "$root" --exclude './dev/*'
rm -rf "$root"/usr/share/{doc,man,locale} "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*
ln -sf /lib/systemd/systemd "$root/init"
strip -o "$root/usr/local/bin/polydev-shim" "$POLYDEV_BIN/polydev-shim"
cp docs/polydev-shim.service "$root/etc/systemd/system/"
install -m 755 tests/systemd/check.sh "$root/check.sh"
cat >"$root/etc/systemd/system/check.service" <<'UNIT'
[Unit]
After=basic.target
[Service]
Type=oneshot
ExecStart=/check.sh
[Install]
WantedBy=multi-user.target
UNIT
# As the first lines of the unit say, and with its optional parts.
chroot "$root" groupadd --system polydev-node
chroot "$root" useradd --system --no-create-home --shell /usr/sbin/nologin polydev-shim
mkdir -p "$root/etc/polydev" "$root/etc/systemd/system/polydev-shim.service.d" "$root/etc/systemd/system/multi-user.target.wants"
for key in audit-key master-keys; do
    od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >"$root/etc/polydev/$key"
done
chmod 600 "$root"/etc/polydev/*
cat >"$root/etc/systemd/system/polydev-shim.service.d/parts.conf" <<'UNIT'
[Service]
Environment=POLYDEV_CREDENTIAL_STORE=sqlite:///var/lib/polydev-shim/credentials.db
Environment=NOMAD_ADDR=http://127.0.0.1:4646
Environment=POLYDEV_AUDIT_LOG=/var/lib/polydev-shim/audit POLYDEV_AUDIT_KEY_FILE=%d/audit-key
LoadCredential=polydev-master-keys:/etc/polydev/master-keys
LoadCredential=audit-key:/etc/polydev/audit-key
UNIT
ln -s ../check.service "$root/etc/systemd/system/multi-user.target.wants/check.service"
ln -sf multi-user.target "$root/etc/systemd/system/default.target"
echo uninitialized >"$root/etc/machine-id"
(cd "$root" && find . | cpio --quiet --create --format newc) >"$work/initramfs"
rm -rf "$root"

timeout 420 qemu-system-x86_64 -accel tcg -smp 2 -m 2048 -nographic -no-reboot \
    -kernel "$kernel" -initrd "$work/initramfs" \
    -append "console=ttyS0 quiet panic=-1 cgroup_no_v1=all systemd.show_status=no" </dev/null | tee "$work/console" || true
grep -q PASSED "$work/console" || fail "the unit does not work"
