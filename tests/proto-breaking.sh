#!/bin/bash
# Whether programs of the last release can still read our protocols: `proto/baseline.binpb` is
# what they were then. RELEASING.md says when it is made anew.
set -euo pipefail
cd "$(dirname "$0")/../proto"
buf breaking --against baseline.binpb
