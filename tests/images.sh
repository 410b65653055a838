#!/bin/bash
# Builds the images that are not up to date; what that needs is installed first.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
if ! "$DOCKER" image inspect node:20-slim >/dev/null 2>&1 && ! timeout 300 "$DOCKER" pull --quiet node:20-slim >/dev/null 2>&1; then
    packages mmdebstrap=mmdebstrap npm=npm
fi
exec containers/build.sh
