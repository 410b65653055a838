#!/bin/bash
# build.sh: prints the path of an OpenTelemetry Collector with OTLP and Prometheus: the one
# in PATH, or one built from the Go module beside this script, which the cache keeps.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/lib.sh

if command -v otelcol-contrib; then exit; fi
go_program collector tests/collector . "install Go 1.26 or newer, or put otelcol-contrib into PATH" \
    -gcflags=all='-dwarf=false -N -l' # It has little to do: not optimized, it is there in half the time.
