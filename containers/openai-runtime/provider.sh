# What entrypoint.sh needs to know about Codex. The shim's provider table says
# the same in Rust; a test runs both and compares.
polydev_provider=openai
polydev_cli=codex
polydev_key=OPENAI_API_KEY
polydev_sign_in_file=.codex/auth.json

has_key() { [ -n "${OPENAI_API_KEY:-}" ]; }

# Codex takes its key from CODEX_API_KEY alone.
prepare_credentials() {
    if has_key; then export CODEX_API_KEY="$OPENAI_API_KEY"; fi
}
