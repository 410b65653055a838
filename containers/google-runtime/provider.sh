# shellcheck shell=sh disable=SC2034  # entrypoint.sh reads them.
# What entrypoint.sh needs to know about the Gemini CLI. The shim's provider table contains
# the same in Rust. A test runs both and compares them.
polydev_provider=google
polydev_cli=gemini
polydev_key=GOOGLE_API_KEY
polydev_sign_in_file=.gemini/oauth_creds.json

has_key() { [ -n "${GOOGLE_API_KEY:-}" ]; }

# A key alone is a Gemini API key. A key with a project is a Vertex AI key. The CLI does
# not guess: its settings file must name the way to sign in.
prepare_credentials() {
    if ! has_key; then
        polydev_auth=oauth-personal
    elif [ -n "${GOOGLE_PROJECT_ID:-}" ]; then
        export GOOGLE_GENAI_USE_VERTEXAI=true GOOGLE_CLOUD_PROJECT="$GOOGLE_PROJECT_ID"
        polydev_auth=vertex-ai
    else
        export GEMINI_API_KEY="$GOOGLE_API_KEY"
        unset GOOGLE_API_KEY
        polydev_auth=gemini-api-key
    fi
    polydev_settings=$HOME/.gemini/settings.json
    if [ ! -e "$polydev_settings" ]; then
        (umask 077 && printf '{"security":{"auth":{"selectedType":"%s"}}}\n' "$polydev_auth" >"$polydev_settings")
    fi
}
