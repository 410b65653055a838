#!/bin/bash
# Checks that programs of the last release can still read our protocols. `proto/baseline.binpb`
# has the protocols of that release. RELEASING.md says when it is made again.
set -euo pipefail
cd "$(dirname "$0")/../proto"
buf breaking --against baseline.binpb
