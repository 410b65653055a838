//! What a CLI reads whose key is at the broker: where the broker is, and a placeholder for the
//! key. A command that starts has it from the shim, and an agent that waits from its start.

use crate::{prompt::toml_string, provider::Vendor};

/// Where a container asks the broker, on its own 127.0.0.1.
pub const PORT: u16 = 8319;

/// In place of a key that the container does not have.
const PLACEHOLDER: &str = "the-key-is-at-the-broker";

/// Gemini CLI does not guess: its settings must name the way to sign in.
pub const GEMINI_KEY: &str = "{\"security\":{\"auth\":{\"selectedType\":\"gemini-api-key\"}}}\n";

/// What the image has in the same file: without it, Codex ends five seconds late in a container
/// without a network.
const CODEX_QUIET: &str = "check_for_update_on_startup = false\n[analytics]\nenabled = false\n";

/// The environment and the file that a CLI needs.
#[derive(Debug, PartialEq, Eq)]
pub struct Outside {
    pub env: Vec<(&'static str, String)>,
    pub file: Option<File>,
}

/// A file without secrets.
#[derive(Debug, PartialEq, Eq)]
pub struct File {
    /// Relative to the home folder.
    pub path: &'static str,
    pub content: String,
}

impl File {
    /// Codex 0.171 reads another server only from its configuration.
    #[must_use]
    pub fn codex_server(url: &str) -> Self {
        Self {
            path: ".codex/config.toml",
            content: format!("openai_base_url = {}\n{CODEX_QUIET}", toml_string(url)),
        }
    }
}

impl Outside {
    /// What the provider's CLI reads.
    #[must_use]
    pub fn of(provider: Vendor) -> Self {
        let url = |path: &str| format!("http://127.0.0.1:{PORT}{path}");
        let key = || PLACEHOLDER.to_owned();
        match provider {
            Vendor::OpenAi => Self {
                env: vec![
                    ("OPENAI_API_KEY", key()),
                    ("CODEX_API_KEY", key()),
                    ("OPENAI_BASE_URL", url("/openai/v1")),
                ],
                file: Some(File::codex_server(&url("/openai/v1"))),
            },
            Vendor::Anthropic => Self {
                env: vec![
                    ("ANTHROPIC_API_KEY", key()),
                    ("ANTHROPIC_BASE_URL", url("/anthropic")),
                ],
                file: None,
            },
            Vendor::Google => Self {
                env: vec![
                    ("GEMINI_API_KEY", key()),
                    ("GOOGLE_GEMINI_BASE_URL", url("/google")),
                ],
                file: Some(File {
                    path: ".gemini/settings.json",
                    content: GEMINI_KEY.into(),
                }),
            },
        }
    }
}
