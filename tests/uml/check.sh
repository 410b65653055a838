#!/bin/sh
# Runs as process 1 of the machine of uml.sh, and ends it.
export PATH=/work:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
export NOMAD_ADDR=http://127.0.0.1:4646 ANTHROPIC_API_KEY=none

mount -t sysfs sysfs /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for folder in /dev/shm /run /tmp; do mount -t tmpfs tmpfs "$folder"; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount /dev/ubda /var/lib/docker
# As systemd makes all mounts.
mount --make-rshared /
ip link set lo up

off() {
    sync
    echo o >/proc/sysrq-trigger
    sleep 60
}
step() { echo "==> $(cut -d' ' -f1 /proc/uptime) s: $*"; }
fail() {
    echo "FAILED: $*"
    tail -n 20 /tmp/dockerd.log /tmp/shim.log
    grep -e polydev -e WARN -e ERROR /tmp/nomad.log | cut -c1-400 | tail -n 30
    off
}
# is WHAT GOT EXPECTED
is() { [ "$2" = "$3" ] || fail "$1: it is '$2', and must be '$3'"; }
# until SECONDS WHAT COMMAND...
until_is() {
    most=$1 what=$2
    shift 2
    since=$(cut -d. -f1 /proc/uptime)
    until "$@"; do
        [ $(($(cut -d. -f1 /proc/uptime) - since)) -lt "$most" ] || fail "not within $most s: $what"
        sleep 0.5
    done
}
api() { curl --silent "$NOMAD_ADDR$1"; }

step "dockerd"
dockerd --live-restore --config-file /work/daemon.json >/tmp/dockerd.log 2>&1 &
docker_answers() { docker version >/dev/null 2>&1; }
until_is 120 "dockerd" docker_answers
docker info 2>/dev/null | grep -e 'Server Version' -e 'Cgroup Version' -e 'Storage Driver' -e Kernel
is_as_set() {
    case $(cat /work/machine) in
        26) docker info 2>/dev/null | grep -q 'Server Version: 26' ;;
        # The version of API of Engine 29, and its own image store.
        29) [ "$(docker version --format '{{.Server.APIVersion}} {{.Server.Os}}')" = '1.56 linux' ] &&
            docker info 2>/dev/null | grep -q 'driver-type: io.containerd.snapshotter' ;;
        ipv6) docker network inspect bridge | grep -q '"EnableIPv6": true' ;;
        userns) docker info 2>/dev/null | grep -q userns ;;
    esac
}
is_as_set || fail "the engine is not the one of machine $(cat /work/machine): $(docker info 2>/dev/null)"
mkdir -p /tmp/image/bin /tmp/image/tmp
chmod 1777 /tmp/image/tmp
cp /bin/busybox /tmp/image/bin/
for name in sh echo sleep seq md5sum cat awk id wget touch ls head tail grep; do ln -s busybox "/tmp/image/bin/$name"; done
tar -C /tmp/image -c . >/tmp/image.tar
docker import --change 'CMD ["sh"]' /tmp/image.tar polydev-busybox:1 >/dev/null
docker import --change 'USER 1000' --change 'CMD ["sh"]' /tmp/image.tar polydev-anthropic-runtime:latest >/dev/null

step "the agent, with the driver"
mkdir /tmp/plugins
cp /work/nomad-driver-polydev /tmp/plugins/
cat >/tmp/agent.hcl <<'AGENT'
data_dir   = "/tmp/nomad"
plugin_dir = "/tmp/plugins"
bind_addr  = "127.0.0.1"
disable_update_check = true
client {
  enabled           = true
  network_interface = "lo"
  cpu_total_compute = 4000
  memory_total_mb   = 4096
  options = {
    "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean"
    "driver.allowlist"     = "polydev"
  }
}
plugin "nomad-driver-polydev" {
  config {
    state_dir = "/tmp/s"
    init_path = "/work/polydev-init"
  }
}
AGENT
nomad agent -dev -config /tmp/agent.hcl >/tmp/nomad.log 2>&1 &
driver_is_healthy() { api /v1/nodes | grep -q '"driver.polydev.cgroup_version":"2".*"Healthy":true'; }
until_is 120 "a healthy driver" driver_is_healthy

# batch ID CONFIG MEMORY
batch() {
    cat >/tmp/job.json <<JOB
{"Job": {"ID": "$1", "Name": "$1", "Type": "batch", "Datacenters": ["*"], "TaskGroups": [{"Name": "g",
  "RestartPolicy": {"Attempts": 0, "Mode": "fail"}, "ReschedulePolicy": {"Attempts": 0, "Unlimited": false},
  "Tasks": [{"Name": "t", "Driver": "polydev", "Config": {"image": "polydev-busybox:1", $2},
  "Resources": {"CPU": 500, "MemoryMB": $3}}]}]}}
JOB
    curl --silent --show-error --fail --request PUT --data @/tmp/job.json "$NOMAD_ADDR/v1/jobs" >/dev/null || fail "submit $1"
}
has_ended() { api "/v1/job/$1/allocations" | grep -q -e '"ClientStatus":"complete"' -e '"ClientStatus":"failed"'; }
alloc() { api "/v1/job/$1/allocations" | grep -o '"ID":"[^"]*"' | head -n 1 | cut -d'"' -f4; }
logs() { api "/v1/client/fs/logs/$(alloc "$1")?task=t&type=stdout&plain=true&origin=start"; }
events() { api "/v1/job/$1/allocations" | grep -o '"DisplayMessage":"[^"]*"'; }

step "a plain task: its limits, its output, its end"
files='cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory.swap.max /sys/fs/cgroup/pids.max'
# The address needs Docker 25.
address='cat /sys/class/net/eth0/address'
batch plain "\"cpu_hard_limit\": true, \"pids_limit\": 50, \"mac_address\": \"02:42:00:00:00:07\", \"command\": \"sh\", \"args\": [\"-c\", \"$files; $address; seq 1 5000; exit 3\"]" 64
until_is 60 "the end of a task" has_ended plain
is "limits" "$(logs plain | head -n 4 | tr '\n' ' ')" "12500 100000 67108864 0 50 "
is "its hardware address" "$(logs plain | sed -n 5p)" 02:42:00:00:00:07
is "output" "$(logs plain | tail -n +6 | md5sum)" "$(seq 1 5000 | md5sum)"
events plain | grep -q 'Exit Code: 3' || fail "the end of a plain task: $(events plain)"

step "a plain task that needs too much memory"
batch memory '"command": "sh", "args": ["-c", "head -c 60000000 /dev/zero | tail -c 60000000"]' 16
until_is 60 "the end of a task" has_ended memory
events memory | grep -q 'the kernel killed a process of the task (1)' || fail "out of memory: $(events memory)"

step "a warm pool"
nomad job run -detach -var count=2 -var agent=false /work/pool-anthropic.nomad.hcl >/dev/null || fail "the pool"
polydev-shim serve >/tmp/shim.log 2>&1 &
idle() { polydev-shim pool list 2>/dev/null | awk '$1 == "anthropic" { print $4 }'; }
are_idle() { [ "$(idle)" = 2 ]; }
until_is 120 "two idle slots" are_idle
limits_of() { for id in $(docker ps --quiet --no-trunc); do cat "/sys/fs/cgroup/docker/$id/$1"; done | sort -u; }
is "an idle slot's processor" "$(limits_of cpu.max)" "10000 100000"
is "an idle slot's memory" "$(limits_of memory.max)" 268435456
is "an idle slot's processes" "$(limits_of pids.max)" 64

step "runs"
# A slot is filled in some ten seconds here, which is as long as a run waits for one.
has_idle() { [ "$(idle)" -gt 0 ]; }
run() {
    until_is 120 "an idle slot" has_idle
    polydev-shim run "$@"
}
told=$(run anthropic -- sh -c "id -u; $files")
is "a run's limits" "$(echo "$told" | tr '\n' ' ')" "1000 50000 100000 536870912 0 256 "
is "a run's output" "$(run anthropic -- seq 1 100000 | md5sum)" "$(seq 1 100000 | md5sum)"
run --timeout 20 anthropic -- sleep 100 2>/tmp/words
status=$?
is "a run's deadline ($(cat /tmp/words))" "$status" 124
until_is 120 "two idle slots" are_idle

step "the firewall"
busybox httpd -p 8080 -h /tmp/image
ipv4=$(ip -4 -o addr show docker0 | awk '{ sub("/.*", "", $4); print $4 }')
ipv6=$(ip -6 -o addr show docker0 scope global | awk '{ sub("/.*", "", $4); print "[" $4 "]" }')
[ -n "$ipv4" ] || fail "docker0 has no IPv4 address"
[ -n "$ipv6" ] || [ "$(cat /work/machine)" != ipv6 ] || fail "docker0 has no IPv6 address"
for address in $ipv4 $ipv6; do
    docker run --rm polydev-busybox:1 wget -q -T 20 -O - "http://$address:8080/bin/sh" | cmp -s - /bin/busybox ||
        fail "a container of Docker alone does not reach the machine at $address"
done
bridge=$(ip -4 -o addr show | awk '$2 ~ /^pd-/ { sub("/.*", "", $4); print $4 }')
[ -n "$bridge" ] || fail "the bridge of the slots has no address"
for address in $ipv4 $ipv6 $bridge; do
    told=$(run anthropic -- sh -c "echo tries; wget -q -T 5 -O /dev/null http://$address:8080/bin/sh || echo refused")
    is "a run that asks $address" "$(echo "$told" | tr '\n' ' ')" "tries refused "
done

step "a driver that is killed, and the run that goes on"
id=$(run --detach anthropic -- sh -c 'echo before; sleep 30; echo after')
before=$(cat /tmp/s/driver.lock)
kill -9 "$before"
another_driver() { [ "$(cat /tmp/s/driver.lock)" != "$before" ]; }
until_is 60 "another driver" another_driver
# While no driver answers, a shim says so.
attached() { polydev-shim runs attach "$id" >/tmp/told 2>/dev/null; }
until_is 120 "the rest of the run" attached
is "the run" "$(tr '\n' ' ' </tmp/told)" "before after "
until_is 120 "two idle slots after the run" are_idle

step "exec in a plain task"
batch open '"command": "sleep", "args": ["1000"]' 16
is_running() { api "/v1/job/$1/allocations" | grep -q '"ClientStatus":"running"'; }
until_is 60 "a task" is_running open
is "exec" "$(nomad alloc exec -i=false -t=false "$(alloc open)" id -u)" 0

step "all of it"
echo PASSED
off
