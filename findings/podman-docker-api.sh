#!/usr/bin/env bash
# Podman's API for Docker's clients: the options of a tmpfs and of a network.
#
# Versions: podman 5.4.2+ds1-2+b2 with netavark and crun of Debian 13. Needs bash, root (for
# Podman's storage and a network namespace), mmdebstrap, unshare, curl, python3.
#
# A good guess: with `POST /v1.41/containers/create`, a tmpfs takes the options that Docker takes,
# `uid` and `gid` among them; `GET /networks/NAME` tells the options with which the network was
# made.
# Seen: the container is not created, because the mount option is unknown. The network's bridge
# has the name of the option, and `Options` of the answer is empty.
#
# Where it matters: a slot's home is a tmpfs of its user, and the driver checks that the network
# of the slots is what it made (driver/src/docker.rs refuses Podman; docs/engines.md).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

timeout 600 mmdebstrap --quiet --variant=minbase \
    --include=podman=5.4.2+ds1-2+b2,netavark,crun trixie "$work/root.tar" >&2
mkdir "$work/root"
tar --extract --file "$work/root.tar" --directory "$work/root" --exclude './dev/*'
printf '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n' >"$work/root/etc/containers/containers.conf"

cat >"$work/ask.sh" <<'ASK'
set -euo pipefail
root=$1
mount --make-rprivate /
# What is to be its root must be a mount.
mount --bind "$root" "$root"
for folder in proc dev sys; do mount --rbind "/$folder" "$root/$folder"; done
mount -t tmpfs tmpfs "$root/run"
ip link set lo up
PODMAN_IGNORE_CGROUPSV1_WARNING=1 chroot "$root" podman --storage-driver vfs \
    system service --time=0 unix:///run/podman.sock >"$root/log" 2>&1 &
service=$!
trap 'kill "$service"' EXIT
ask() {
    local path=$1
    shift
    curl --silent --show-error --unix-socket "$root/run/podman.sock" "http://podman/v1.41$path" "$@"
}
for _ in $(seq 100); do
    [ "$(ask /_ping 2>/dev/null || true)" = OK ] && break
    sleep 0.2
done
tar --create --directory "$root/etc" passwd | ask '/images/create?fromSrc=-&repo=one&tag=1' \
    --data-binary @- --header 'Content-Type: application/x-tar' >/dev/null
create() {
    ask /containers/create --header 'Content-Type: application/json' --data \
        '{"Image": "one:1", "Cmd": ["x"], "HostConfig": {"Tmpfs": {"/home": "'"$1"'"}}}'
}
says() { python3 -c 'import json, sys; told = json.load(sys.stdin); print(told.get("message") or "created")'; }
printf 'mode=0700: %s\n' "$(create rw,mode=0700 | says)"
printf 'uid=1000: %s\n' "$(create rw,mode=0700,uid=1000 | says)"
ask /networks/create --header 'Content-Type: application/json' --data \
    '{"Name": "net", "Driver": "bridge", "Options": {"com.docker.network.bridge.name": "named0"}}' >/dev/null
printf 'options: %s\n' "$(ask /networks/net | python3 -c 'import json, sys; print(json.load(sys.stdin)["Options"])')"
printf 'bridge: %s\n' "$(chroot "$root" podman --storage-driver vfs network inspect net --format '{{.NetworkInterface}}')"
ASK

seen=$(unshare --mount --net bash "$work/ask.sh" "$work/root")
recorded='mode=0700: created
uid=1000: container create: unknown mount option "uid=1000": invalid mount option
options: {}
bridge: named0'
echo "expected: created, created, the option, named0"
printf 'seen:\n%s\n' "$seen"
if [ "$seen" != "$recorded" ]; then
    printf 'CHANGED: recorded was:\n%s\n' "$recorded" >&2
    exit 1
fi
