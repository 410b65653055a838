# shellcheck shell=sh disable=SC2034  # entrypoint.sh reads them.
# What entrypoint.sh needs to know about Claude Code. The shim's provider table contains
# the same in Rust. A test runs both and compares them.
polydev_provider=anthropic
polydev_cli=claude
polydev_key=ANTHROPIC_API_KEY
polydev_sign_in_file=.claude/.credentials.json

has_key() { [ -n "${ANTHROPIC_API_KEY:-}" ]; }

# Claude Code reads ANTHROPIC_API_KEY itself.
prepare_credentials() { :; }
