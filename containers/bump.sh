#!/bin/bash
# Moves the pinned CLIs to the newest versions of the npm registry, builds the images again and
# runs the tests that know the CLIs. Usage: containers/bump.sh [PROVIDER...] (default: all; as root)
# The files that it has changed stay changed, whether the tests pass or not: commit or revert them.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh

declare -A package=([openai]=@openai/codex [anthropic]=@anthropic-ai/claude-code [google]=@google/gemini-cli)
[ $# -gt 0 ] || set -- openai anthropic google
packages npm=npm
for provider in "$@"; do
    [ -n "${package[$provider]:-}" ] || fail "\`$provider\` must be one of openai, anthropic, google"
    file=containers/$provider-runtime/Dockerfile
    pinned=$(sed -n 's/^ARG CLI_VERSION=//p' "$file" | head -n 1)
    newest=$(npm view "${package[$provider]}" version)
    if [ "$newest" = "$pinned" ]; then
        step "${package[$provider]} $pinned is the newest"
        continue
    fi
    step "${package[$provider]}: $pinned becomes $newest"
    sed -i "s/^ARG CLI_VERSION=.*/ARG CLI_VERSION=$newest/" "$file"
done
POLYDEV_NOMAD=$(tests/nomad/build.sh)
export POLYDEV_NOMAD
make build
tests/with-docker.sh tests/images.sh
tests/with-docker.sh make it TESTS='test(/^(images|agents)::/) | test(/the_real_clis/)'
step "the tests pass; docs/agents.md and docs/egress.md name versions too"
