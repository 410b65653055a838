# What entrypoint.sh needs to know about Claude Code. The shim's provider table
# says the same in Rust; a test runs both and compares.
polydev_provider=anthropic
polydev_cli=claude
polydev_key=ANTHROPIC_API_KEY
polydev_sign_in_file=.claude/.credentials.json

has_key() { [ -n "${ANTHROPIC_API_KEY:-}" ]; }

# Claude Code reads the documented variable.
prepare_credentials() { :; }
