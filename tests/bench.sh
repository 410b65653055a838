#!/bin/bash
# make bench [PARTS="warm starts ..."]: see tests/src/bin/bench/main.rs.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh

if [ -z "${POLYDEV_BENCH_ENGINE:-}" ]; then
    need_root bench
    POLYDEV_BENCH_ENGINE=1 exec tests/with-docker.sh "$0" "$@"
fi
tests/images.sh
POLYDEV_NOMAD=$(tests/nomad/build.sh)
POLYDEV_COLLECTOR=$(tests/collector/build.sh)
export POLYDEV_NOMAD POLYDEV_COLLECTOR
exec target/release/bench "$@"
