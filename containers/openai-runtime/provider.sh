# What entrypoint.sh needs to know about Codex. The shim's provider table says
# the same in Rust; a test runs both and compares.
DEFAULT_PROVIDER=openai
CLI=codex
KEY=OPENAI_API_KEY
SIGN_IN_FILE=.codex/auth.json

has_key() { [ -n "${OPENAI_API_KEY:-}" ]; }

# Codex takes its key from CODEX_API_KEY alone.
prepare_credentials() {
    if has_key; then export CODEX_API_KEY="$OPENAI_API_KEY"; fi
}
