#!/bin/bash
# run.sh SECONDS [TARGET...]: runs each fuzz target for so long, three at a time. What they
# have learnt is kept in target/fuzz; an input that fails is printed and kept there too.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/lib.sh
need c++ "apt-get install g++"

seconds=$1
shift
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(agent conversation config state journal frames handshake credentials requests usage audit payload token policy)
# As examples of the whole workspace, their dependencies have the features that `make build` has
# given them, and are not compiled again.
RUSTC_WORKSPACE_WRAPPER=$PWD/tests/fuzz/rustc.sh \
    cargo build --locked --workspace --features polydev-fuzz/libfuzzer --example 'fuzz-*'

one() {
    local folder=target/fuzz/$1
    mkdir -p "$folder"
    if ! "target/debug/examples/fuzz-$1" "$folder" "tests/fuzz/seeds/$1" \
        -artifact_prefix="$folder-failed-" -max_total_time="$2" -timeout=5 -rss_limit_mb=1024 \
        -max_len=65536 -print_final_stats=1 -verbosity=0 >"$folder.log" 2>&1; then
        cat "$folder.log" >&2
        printf 'FAILED: fuzz target %s\n' "$1" >&2
        return 1
    fi
    printf '%s: %s inputs in %s s, %s kept\n' "$1" \
        "$(awk '/number_of_executed_units/ { print $2 }' "$folder.log")" "$2" "$(find "$folder" -type f | wc -l)"
}
export -f one
printf '%s\n' "${targets[@]}" | xargs -P 3 -I{} bash -c 'one "$@"' _ {} "$seconds"
