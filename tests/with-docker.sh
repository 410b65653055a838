#!/bin/bash
# with-docker.sh COMMAND...: runs COMMAND with a Docker engine. Installs the
# distribution's if there is none, starts it if none answers, and stops it again
# if it was started here.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh

need_root "${MAKECMDGOALS:-test}"
packages dockerd=docker.io iptables=iptables ip=iproute2 curl=curl
DOCKER=$(docker_program)
export DOCKER

if ! "$DOCKER" info >/dev/null 2>&1; then
    step "starting dockerd"
    log=$(mktemp)
    setsid dockerd --live-restore >"$log" 2>&1 </dev/null &
    engine=$!
    trap 'step "stopping dockerd"; kill "$engine"; wait "$engine" || true; rm -f "$log"' EXIT
    for _ in $(seq 150); do
        if "$DOCKER" info >/dev/null 2>&1; then break; fi
        kill -0 "$engine" 2>/dev/null || { cat "$log" >&2; fail "dockerd ended"; }
        sleep 0.2
    done
    "$DOCKER" info >/dev/null || { cat "$log" >&2; fail "dockerd does not answer"; }
fi
"$@"
