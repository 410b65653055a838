#!/bin/bash
# test.sh [check|docker|nomad|long]: `make test` and its parts. Ends with how many checks and
# tests passed and failed. Nothing is skipped: a test that cannot run has failed.
#
#   check    format, clippy, docs, scripts, unit, property, model and service tests
#   docker   the tests of the whole system that need Docker alone
#   nomad    the tests with a Nomad agent
#   long     the tests that take minutes each, the virtual machine with other engines, and all
#            tests with an agent, under Nomad 1.10
#
# Without an argument: everything but `long`.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh

part=${1:-all}
is() { [[ " $* " = *" $part "* ]]; }

need cargo "install Rust, see https://rustup.rs"
need make "apt-get install make"
need cc "apt-get install gcc"
if ! is check && [ -z "${POLYDEV_TEST_ENGINE:-}" ]; then
    need_root test
    need c++ "apt-get install g++"
    need node "apt-get install nodejs (20 or newer)"
    need npm "apt-get install npm"
    command -v grpcurl >/dev/null || need go "install Go 1.26 or newer, or put grpcurl into PATH"
    command -v nomad >/dev/null || need go "install Go 1.26 or newer to build Nomad, or put a Nomad 1.11 into PATH"
    command -v otelcol-contrib >/dev/null || need go "install Go 1.26 or newer to build a collector, or put otelcol-contrib into PATH"
    ! is long || need go "install Go 1.26 or newer, which builds Docker Engine 29"
    POLYDEV_TEST_ENGINE=1 exec tests/with-docker.sh "$0" "$@"
fi

passed=0 failed=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# check NAME COMMAND...: one test that is a command.
check() {
    local name=$1
    shift
    step "$name"
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAILED: %s\n' "$name" >&2
    fi
}

# beside NAME COMMAND...: it runs in the background.
declare -A running
beside() {
    local name=$1
    shift
    "$@" >"$work/$name.log" 2>&1 &
    running[$name]=$!
}
# joined NAME: waits until it has ended, shows its output, and has its status.
joined() {
    local status=0
    wait "${running[$1]}" || status=$?
    cat "$work/$1.log"
    return "$status"
}

# tests NAME COMMAND...: what nextest and cargo test count.
tests() {
    local name=$1 status=0 p f
    shift
    step "$name"
    "$@" 2>&1 | tee "$work/log" || status=$?
    read -r p f < <(sed 's/\x1b\[[0-9;]*m//g' "$work/log" | awk '
        /^ *Summary \[/ {
            for (i = 2; i <= NF; i++) {
                if ($i ~ /^passed/) p += $(i - 1)
                if ($i ~ /^(failed|exec)/ || $i ~ /^timed/) f += $(i - 1)
            }
        }
        /^test result:/ { p += $4; f += $6 }
        END { print p + 0, f + 0 }')
    # The command may end before it counts, for example if it does not compile.
    if [ "$status" != 0 ] && [ "$f" = 0 ]; then f=1; fi
    if [ "$((p + f))" = 0 ]; then f=1; echo "FAILED: $name ran no test" >&2; fi
    passed=$((passed + p)) failed=$((failed + f))
}

# What the tests of the whole system need beside the build: images, Nomad, a collector, and
# the installed clients. Most of the time goes to downloads, so they run during the build.
prepare() {
    tests/images.sh
    tests/nomad/build.sh >"$work/nomad"
    if is long; then tests/nomad/build.sh 1.10 >"$work/nomad-1.10"; fi
    tests/collector/build.sh >"$work/collector"
    tests/prometheus.sh >"$work/prometheus"
    tests/clients.sh >/dev/null
    tests/python.sh >/dev/null
    tests/grpcurl.sh >/dev/null
    tests/compose.sh >/dev/null
    if is all long; then tests/uml/root.sh >/dev/null; fi
    if is long; then tests/engine/build.sh >/dev/null; fi
}

# What reads the code, and runs nothing of it.
reading() {
    check "formatting and clippy" make lint
    check "clippy for arm64" make arm64
    check "documentation" make doc
    check "scripts" make scripts
    check "licences, sources and bans" make deny
    check "protocol lint" make proto-lint
    check "protocols that earlier clients can read" make proto-breaking
    check "no test is ignored" no_test_is_ignored
}
# The same in the background. Tests of the whole system are mostly waiting, and go first.
reading_beside() {
    passed=0 failed=0
    renice -n 19 -p "$BASHPID" >/dev/null
    reading
    echo "$passed $failed" >"$work/reading"
}
reading_joined() {
    local p=0 f=1
    joined reading || true
    [ ! -e "$work/reading" ] || read -r p f <"$work/reading"
    passed=$((passed + p)) failed=$((failed + f))
}
nothing_is_left() { ! tests/leftovers.sh | grep --invert-match --line-regexp --fixed-strings --file "$work/before"; }
no_test_is_ignored() { ! git grep -n '#\[ignore' -- '*.rs'; }
make() { command make --no-print-directory "$@"; }

PATH=$(tests/tools.sh buf cargo-deny cargo-nextest shellcheck):$PATH
export PATH
if is check all; then
    # Build scripts compile C, for which the compiler's own package has no headers.
    packages aarch64-linux-gnu-gcc=gcc-aarch64-linux-gnu
    [ -e /usr/aarch64-linux-gnu/include/stdlib.h ] || packages no-program=libc6-dev-arm64-cross
fi
if ! is check; then
    # For networks of groups, a registry with a password, and a credential store.
    packages /usr/lib/cni/bridge=containernetworking-plugins docker-registry=docker-registry htpasswd=apache2-utils
    compgen -G "/usr/lib/postgresql/*/bin/initdb" >/dev/null || packages initdb=postgresql
    packages qemu-system-x86_64=qemu-system-x86 cpio=cpio mmdebstrap=mmdebstrap busybox=busybox-static
    packages linux.uml=user-mode-linux mkfs.ext4=e2fsprogs
    tests/leftovers.sh >"$work/before"
    beside prepare prepare
fi

if is check; then reading; fi
check "build" make build
if is check all; then tests "unit, property, model and service tests" make unit; fi
if is all; then
    check "fuzz targets" make fuzz
    check "limits on a kernel with cgroup v2" tests/cgroup-v2.sh
    check "what agents of Nomad 2.0.4 call" tests/plugin.sh
fi
system() {
    POLYDEV_NOMAD=$(cat "$work/nomad")
    POLYDEV_COLLECTOR=$(cat "$work/collector")
    POLYDEV_PROMETHEUS=$(cat "$work/prometheus")
    export POLYDEV_NOMAD POLYDEV_COLLECTOR POLYDEV_PROMETHEUS
    check "rules for Prometheus" "$POLYDEV_PROMETHEUS/promtool" test rules ops/prometheus/rules.test.yaml
    case $part in
        all)
            # The compiler is not asked again: it is busy with other checks.
            cargo nextest list --locked --workspace --list-type binaries-only --message-format json >"$work/binaries"
            cargo metadata --locked --format-version 1 >"$work/cargo"
            beside reading reading_beside
            tests "tests of the whole system" make it BUILT="--binaries-metadata $work/binaries --cargo-metadata $work/cargo"
            check "cgroup v2 and Docker 26, in a virtual machine" tests/uml.sh
            reading_joined
            ;;
        docker) tests "tests that need Docker" make it TESTS='not group(nomad)' ;;
        nomad) tests "tests that have a Nomad agent" make it TESTS='group(nomad)' ;;
        long)
            tests "tests that take minutes each" make long
            check "the unit of the shim under systemd" tests/systemd.sh
            for machine in 29 ipv6 userns; do
                check "cgroup v2 and Docker, machine $machine" tests/uml.sh "$machine"
            done
            POLYDEV_NOMAD=$(cat "$work/nomad-1.10")
            tests "tests under Nomad 1.10" make agent
            ;;
        *) fail "no part \`$part\`: check, docker, nomad or long" ;;
    esac
    check "nothing is left behind" nothing_is_left
}
if ! is check; then
    before=$failed
    check "images, Nomad, collector and clients" joined prepare
    # Without these, no test of the whole system can run.
    if [ "$failed" = "$before" ]; then system; fi
fi

echo
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" = 0 ]
