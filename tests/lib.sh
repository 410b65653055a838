# shellcheck shell=bash
# Functions for the other scripts, which source this file in the repository's root.

step() { printf '==> %s\n' "$*" >&2; }
fail() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# Ends with a way out if a program is missing: need PROGRAM HOW-TO-GET-IT
need() { command -v "$1" >/dev/null || fail "\`$1\` is missing: $2"; }

need_root() {
    [ "$(id -u)" = 0 ] || fail "root is needed, for Docker, network namespaces and cgroups: sudo --preserve-env env PATH=\"\$PATH\" make $1"
}

# Waits until no other script makes the same thing: alone NAME
alone() {
    mkdir -p "$POLYDEV_CACHE"
    exec 9>"$POLYDEV_CACHE/.$1.lock"
    flock 9
}

# Debian packages that are missing: packages PROGRAM=PACKAGE...
packages() {
    local missing=() pair
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null || [ -x "/usr/sbin/${pair%%=*}" ] || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} -eq 0 ] && return
    need apt-get "install these by your distribution's means: ${missing[*]}"
    step "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# Prints the path of a program that is built from a Go module and kept for next time:
# go_program NAME MODULE PACKAGE HOW-ELSE-TO-GET-IT [OPTION...]
go_program() {
    local name=$1 module=$2 package=$3 else=$4 content program
    shift 4
    content=$(find "$module" -maxdepth 1 \( -name 'go.*' -o -name '*.go' \) | sort | xargs cat | sha256sum | cut -c1-16)
    program=$POLYDEV_CACHE/$name-$content/$name
    if [ ! -x "$program" ]; then
        need go "$else"
        step "building $module (minutes)"
        mkdir -p "${program%/*}"
        # Nobody debugs it, and a sixth of the time goes to what a debugger needs.
        (cd "$module" && go build -gcflags=all=-dwarf=false -ldflags='-s -w' "$@" -o "$program.partial" "$package") >&2
        mv "$program.partial" "$program"
    fi
    echo "$program"
}

# The engine's own client: another one may come first in PATH.
docker_program() {
    if [ -x /usr/bin/docker ]; then echo /usr/bin/docker; else echo docker; fi
}
