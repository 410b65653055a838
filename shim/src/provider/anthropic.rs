//! Claude Code.

use secrecy::SecretString;

use super::{InvalidPrompt, Prompt, Table, at_the_broker, placeholder, strings, variable};
use crate::secret::Prepared;

pub(super) const TABLE: Table = Table {
    takes_project: false,
    prepare_key,
    prepare_outside,
    base_url: "ANTHROPIC_BASE_URL",
    oauth_file: ".claude/.credentials.json",
    refresh_token: &["claudeAiOauth", "refreshToken"],
    oauth_settings: None,
    prompt,
};

fn prepare_key(key: &SecretString, _project: Option<&str>) -> Prepared {
    let env = vec![variable("ANTHROPIC_API_KEY", key)];
    Prepared {
        env,
        ..Prepared::default()
    }
}

fn prepare_outside() -> Prepared {
    let env = vec![
        variable("ANTHROPIC_API_KEY", &placeholder()),
        variable("ANTHROPIC_BASE_URL", &at_the_broker("/anthropic")),
    ];
    Prepared {
        env,
        ..Prepared::default()
    }
}

fn prompt(prompt: &Prompt, text: Option<&str>) -> Result<Vec<String>, InvalidPrompt> {
    let mut argv = strings(["claude", "-p"]);
    if let Some(model) = prompt.model {
        argv.extend(strings(["--model", model]));
    }
    if let Some(text) = text {
        argv.extend(strings(["--", text]));
    }
    Ok(argv)
}
