# shellcheck shell=sh disable=SC2034  # entrypoint.sh reads them.
# What entrypoint.sh needs to know about Codex. The shim's provider table contains
# the same in Rust. A test runs both and compares them.
polydev_provider=openai
polydev_cli=codex
polydev_key=OPENAI_API_KEY
polydev_sign_in_file=.codex/auth.json

has_key() { [ -n "${OPENAI_API_KEY:-}" ]; }

# Codex reads its key only from CODEX_API_KEY.
prepare_credentials() {
    if has_key; then export CODEX_API_KEY="$OPENAI_API_KEY"; fi
}
