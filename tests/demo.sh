#!/bin/bash
# make demo: one prompt for a real CLI in a warm slot, and the same with `docker run`. With a
# provider's key in the environment, the CLI calls the provider. Otherwise it calls a stand-in.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh

if [ -z "${POLYDEV_DEMO_ENGINE:-}" ]; then
    need_root demo
    POLYDEV_DEMO_ENGINE=1 exec tests/with-docker.sh "$0"
fi
tests/images.sh openai-runtime anthropic-runtime google-runtime

work=$(mktemp -d /tmp/pdtest-XXXXXX)
export POLYDEV_ADDRESS=unix://$work/shim.sock POLYDEV_LISTEN=unix://$work/shim.sock
bin=target/demo
shim='' namespace='' stand_in=''
clean() {
    if [ -n "$shim" ]; then
        step "stopping"
        kill "$shim" 2>/dev/null && wait "$shim" || true
    fi
    if [ -n "$stand_in" ]; then kill "$stand_in" 2>/dev/null || true; fi
    if [ -n "$namespace" ]; then
        ip netns pids "$namespace" | xargs --no-run-if-empty kill
        ip netns delete "$namespace"
    fi
    rm -rf "$work"
}
trap clean EXIT

prompt="In one sentence: what is a warm container?"
dev=() docker_run=()
if [ -n "${ANTHROPIC_API_KEY:-}" ]; then
    provider=anthropic key=ANTHROPIC_API_KEY cli=(claude -p "$prompt")
elif [ -n "${OPENAI_API_KEY:-}" ]; then
    provider=openai key=OPENAI_API_KEY
    cli=(codex exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox "$prompt")
elif [ -n "${GOOGLE_API_KEY:-}" ]; then
    provider=google key=GOOGLE_API_KEY cli=(gemini --skip-trust -p "$prompt")
else
    provider=anthropic key=ANTHROPIC_API_KEY cli=(claude -p "$prompt")
    step "no key is set: a stand-in for the model answers, the CLI is the real one"
    step "(set ANTHROPIC_API_KEY, OPENAI_API_KEY or GOOGLE_API_KEY to talk to the real service)"
    ANTHROPIC_API_KEY=demo-$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')
    export ANTHROPIC_API_KEY
    namespace=pddemo
    ip netns add "$namespace"
    ip link add pddemoh type veth peer name pddemon netns "$namespace"
    ip address add 198.19.255.1/30 dev pddemoh
    ip link set pddemoh up
    ip -n "$namespace" address add 198.19.255.2/30 dev pddemon
    ip -n "$namespace" link set pddemon up
    ip -n "$namespace" link set lo up
    ip -n "$namespace" route add default via 198.19.255.1
    # One that containers reach, and one that the broker reaches.
    ip netns exec "$namespace" "$bin/stand-in" 198.19.255.2:80 &
    "$bin/stand-in" 127.0.0.1:8318 &
    stand_in=$!
    dev=(--base-url "$provider=http://127.0.0.1:8318")
    docker_run=(--env ANTHROPIC_BASE_URL=http://198.19.255.2)
fi

step "starting the embedded engine with one warm $provider slot, in which the CLI waits"
"$bin/polydev-shim" dev --state-dir "$work/state" --pool "$provider=1" "${dev[@]}" 2>"$work/shim.log" &
shim=$!
idle() {
    for _ in $(seq 600); do
        if "$bin/polydev-shim" pool list --output json 2>/dev/null | grep -q '"idle":1'; then return; fi
        kill -0 "$shim" 2>/dev/null || break
        sleep 0.1
    done
    cat "$work/shim.log" >&2
    fail "no slot became warm"
}
idle

limits=(--cpus 0.5 --memory 512m --memory-swap 512m --pids-limit 256)
image=polydev-$provider-runtime:latest
now() { date +%s%N; }
# first COMMAND...: runs it, prints its output, and sets `took` to the milliseconds to its first byte.
first() {
    local start
    start=$(now)
    "$@" </dev/null | {
        IFS= read -rn1 byte
        echo $((($(now) - start) / 1000000)) >"$work/took"
        printf '%s' "$byte"
        cat
    }
    took=$(<"$work/took")
}
by_docker() { "$DOCKER" run --rm "${limits[@]}" --env "$key" "${docker_run[@]}" "$image" "$@" 2>/dev/null; }

step "docker run $image ${cli[*]}"
first by_docker "${cli[@]}"
docker_took=$took

# An agent that waits cannot have a variable any more, so that this run starts the CLI.
step "polydev-shim run $provider --prompt \"$prompt\" --env LANG=C.UTF-8 --timeline"
first "$bin/polydev-shim" run "$provider" --prompt "$prompt" --env LANG=C.UTF-8 --timeline
cold_took=$took
idle

step "polydev-shim run $provider --prompt \"$prompt\" --timeline"
first "$bin/polydev-shim" run "$provider" --prompt "$prompt" --timeline
parked_took=$took
idle

step "the same for \`true\`, which does nothing but start"
start=$(now)
"$bin/polydev-shim" run "$provider" -- true </dev/null
warm_true=$((($(now) - start) / 1000000))
start=$(now)
by_docker true
docker_true=$((($(now) - start) / 1000000))

printf '\n%-44s %14s\n' '' 'to first word'
printf '%-44s %11s ms\n' 'the prompt: docker run' "$docker_took" \
    'the prompt: cold, in a warm container' "$cold_took" \
    'the prompt: parked, the CLI was waiting' "$parked_took"
printf '\n%-44s %14s\n' '' 'to its end'
printf '%-44s %11s ms\n' '`true`: docker run' "$docker_true" '`true`: polydev-shim run' "$warm_true"
