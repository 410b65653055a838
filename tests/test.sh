#!/bin/bash
# make test: every check and every test; ends with how many passed, failed and were
# skipped. Nothing is skipped quietly: what cannot run has failed.
# test.sh long: make test-long, the tests that take minutes each, and all that have a
# Nomad agent once more under Nomad 1.10.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh

if [ -z "${POLYDEV_TEST_ENGINE:-}" ]; then
    need_root test
    need cargo "install Rust, see https://rustup.rs"
    need make "apt-get install make"
    need cc "apt-get install gcc"
    need c++ "apt-get install g++"
    need node "apt-get install nodejs (20 or newer)"
    need npm "apt-get install npm"
    command -v grpcurl >/dev/null || need go "install Go 1.26 or newer, or put grpcurl into PATH"
    command -v nomad >/dev/null || need go "install Go 1.26 or newer to build Nomad, or put a Nomad 1.11 into PATH"
    command -v otelcol-contrib >/dev/null || need go "install Go 1.26 or newer to build a collector, or put otelcol-contrib into PATH"
    POLYDEV_TEST_ENGINE=1 exec tests/with-docker.sh "$0" "$@"
fi

# For networks of groups, a registry with a password, and a credential store.
packages /usr/lib/cni/bridge=containernetworking-plugins docker-registry=docker-registry htpasswd=apache2-utils
compgen -G "/usr/lib/postgresql/*/bin/initdb" >/dev/null || packages initdb=postgresql

passed=0 failed=0 skipped=0
log=$(mktemp)
before=$(mktemp)
trap 'rm -f "$log" "$before"' EXIT
tests/leftovers.sh >"$before"

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

# tests NAME COMMAND...: what cargo test counts.
tests() {
    local name=$1 status=0 counts
    shift
    step "$name"
    "$@" 2>&1 | tee "$log" || status=$?
    counts=$(awk '/^test result:/ { p += $4; f += $6; s += $8 } END { print p + 0, f + 0, s + 0 }' "$log")
    read -r p f s <<<"$counts"
    # It may end before it counts, as when it does not compile.
    if [ "$status" != 0 ] && [ "$f" = 0 ]; then f=1; fi
    if [ "$((p + f))" = 0 ]; then f=1; echo "FAILED: $name ran no test" >&2; fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
}

if [ "${1:-}" != long ]; then
    tools=$(tests/tools.sh)
    export PATH=$tools:$PATH
    check "formatting and clippy" make --no-print-directory lint
    check "licences, sources and bans" make --no-print-directory deny
    check "protocol lint" make --no-print-directory proto-lint
fi
check "build" make --no-print-directory build
if [ "${1:-}" != long ]; then
    tests "unit tests" make --no-print-directory unit
    check "fuzz targets" make --no-print-directory fuzz
    check "limits on a kernel with cgroup v2" tests/cgroup-v2.sh
fi
check "images" tests/images.sh
POLYDEV_NOMAD=$(tests/nomad/build.sh)
export POLYDEV_NOMAD
if [ "${1:-}" = long ]; then
    older=$(tests/nomad/build.sh 1.10)
else
    POLYDEV_COLLECTOR=$(tests/collector/build.sh)
    export POLYDEV_COLLECTOR
fi
tests "tests of the whole system" make --no-print-directory "${1:-it}"
if [ "${1:-}" = long ]; then
    POLYDEV_NOMAD=$older
    tests "tests under Nomad 1.10" make --no-print-directory agent
fi
nothing_left() { ! tests/leftovers.sh | grep --invert-match --line-regexp --fixed-strings --file "$before"; }
check "nothing is left behind" nothing_left

echo
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] && [ "$skipped" = 0 ]
