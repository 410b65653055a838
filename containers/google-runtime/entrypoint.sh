#!/bin/sh
# Entry point for people who `docker run` this image. Warm slots do not use it: there
# polydev-init starts the command, and the shim prepares the key. This file is the same
# in every runtime image; the differences are in provider.sh.
set -eu

# Its variables begin with polydev_, so that they do not hide a variable of the user.
# shellcheck source=provider.sh
. /runtime/provider.sh

say() { printf '%s\n' "$*" >&2; }
debug() { if [ "${DEBUG:-}" = true ]; then say "DEBUG: $*"; fi; }

# A trap and a wait, because the kernel ignores a SIGTERM that process 1 does not handle.
idle() {
    say "idle: waiting for work"
    trap 'exit 0' TERM INT
    while :; do
        sleep 86400 &
        wait $!
    done
}

# True if "$@" is the provider's CLI with anything other than its version or help.
needs_key() {
    [ "${1##*/}" = "$polydev_cli" ] || return 1
    if [ $# -eq 2 ]; then
        case $2 in --version | --help | -h | -V | -v) return 1 ;; esac
    fi
    return 0
}

say "polydev ${PROVIDER:-$polydev_provider} runtime, user ${USER_ID:-unknown}"

if [ "${WARM_POOL:-}" = true ] || [ $# -eq 0 ]; then
    debug "no key is needed to idle"
    idle
fi

if has_key || [ -e "$HOME/$polydev_sign_in_file" ]; then
    prepare_credentials
    debug "credentials are prepared for $polydev_cli"
elif needs_key "$@"; then
    say "ERROR: $polydev_key not provided"
    exit 1
else
    say "WARNING: $polydev_key not provided; $polydev_cli will not be able to sign in"
fi

debug "running $1 with $(($# - 1)) arguments"
exec "$@"
