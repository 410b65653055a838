#!/bin/bash
# make chaos [MINUTES=n] [SEED=s]: see tests/chaos/main.rs.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh

if [ -z "${POLYDEV_CHAOS_ENGINE:-}" ]; then
    need_root chaos
    POLYDEV_CHAOS_ENGINE=1 exec tests/with-docker.sh "$0" "$@"
fi
tests/images.sh
POLYDEV_NOMAD=$(tests/nomad/build.sh)
export POLYDEV_NOMAD
exec target/release/chaos run "$@"
