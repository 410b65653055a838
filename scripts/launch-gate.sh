#!/bin/bash
# launch-gate.sh: whether this checkout may be released. Stops at the first step that fails, with
# status 1.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
PATH=$(tests/tools.sh cargo-nextest):$PATH
export PATH

fail_at() {
    printf 'launch gate: FAILED at "%s"\n' "$1" >&2
    exit 1
}
# gate NAME COMMAND...
gate() {
    local name=$1
    shift
    step "$name"
    "$@" || fail_at "$name"
}

# All parts that are released have one version.
versions() {
    local rust node python
    rust=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"$/\1/p' Cargo.toml)
    node=$(sed -n 's/^  "version": "\(.*\)",$/\1/p' clients/node/package.json)
    python=$(sed -n 's/^version = "\(.*\)"$/\1/p' clients/python/pyproject.toml)
    echo "Rust $rust, Node $node, Python $python"
    [ -n "$rust" ] && [ "$rust" = "$node" ] && [ "$rust" = "$python" ]
}
tests_of() { cargo nextest run --locked --workspace --no-fail-fast -E "$1"; }
corpus() {
    local said
    said=$(cargo nextest run --locked --workspace --no-capture -E 'binary(corpus)' 2>&1) || {
        echo "$said" >&2
        return 1
    }
    grep -E '^(vectors|refused)' <<<"$said"
    grep -qx 'vectors: 50' <<<"$said" && grep -qx 'refused: 50' <<<"$said" &&
        grep -qx 'refused by a missing grant alone: 0' <<<"$said"
}
trilogy() { cargo run --locked --quiet --package polydev-tool-gate -- trilogy; }

gate "versions agree" versions
gate "red team: tokens, replay, arguments, seals" tests_of 'package(polydev-tool-gate) | package(polydev-policy)'
gate "every sink of a registry is known" tests_of 'test(/^registry::/) & package(polydev-tool-gate)'
gate "fifty vectors" corpus
gate "three tasks without and with the gate" trilogy
gate "the whole suite" make test
echo "launch gate: passed"
