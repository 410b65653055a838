//! Claude Code.

use secrecy::SecretString;

use super::{InvalidPrompt, Prompt, Table, strings, variable};
use crate::secret::Prepared;

pub(super) const TABLE: Table = Table {
    takes_project: false,
    prepare_key,
    base_url: "ANTHROPIC_BASE_URL",
    server_file: None,
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

fn prompt(prompt: &Prompt, text: Option<&str>) -> Result<Vec<String>, InvalidPrompt> {
    // The container is the sandbox.
    let mut argv = strings(["claude", "-p", "--dangerously-skip-permissions"]);
    if let Some(model) = prompt.model {
        argv.extend(strings(["--model", model]));
    }
    argv.extend(prompt.options.args.iter().cloned());
    if let Some(text) = text {
        argv.extend(strings(["--", text]));
    }
    Ok(argv)
}
