#!/bin/bash
# What agents from Nomad 2.0.4 on call, over the real go-plugin: `Init` before anything else, and
# `Shutdown` before go-plugin's own end.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
POLYDEV_BIN=${POLYDEV_BIN:-$PWD/target/under-test}

host=$(go_program plugin-host tests/plugin . "install Go 1.26 or newer")
told=$("$host" "$POLYDEV_BIN/nomad-driver-polydev" 2>/dev/null)
[ "$told" = $'Init\nTaskConfigSchema\nShutdown\nended' ] || fail "the host was told: $told"
