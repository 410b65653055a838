# What entrypoint.sh needs to know about Claude Code. The shim's provider table
# says the same in Rust; a test runs both and compares.
DEFAULT_PROVIDER=anthropic
CLI=claude
KEY=ANTHROPIC_API_KEY
SIGN_IN_FILE=.claude/.credentials.json

has_key() { [ -n "${ANTHROPIC_API_KEY:-}" ]; }

# Claude Code reads the documented variable.
prepare_credentials() { :; }
