//! Claude Code.

use super::{InvalidPrompt, Prompt, Table, strings, variable};
use crate::credential::{Credential, Prepared};

pub(super) const TABLE: Table = Table {
    name: "anthropic",
    alias: "claude_code",
    key_variable: "ANTHROPIC_API_KEY",
    project_variable: None,
    prepare,
    prompt,
};

fn prepare(credential: &Credential) -> Prepared {
    let env = [variable("ANTHROPIC_API_KEY", &credential.api_key)].into();
    Prepared { env, files: vec![] }
}

fn prompt(prompt: &Prompt) -> Result<Vec<String>, InvalidPrompt> {
    let mut argv = strings(["claude", "-p"]);
    if let Some(model) = prompt.model {
        argv.extend(strings(["--model", model]));
    }
    argv.extend(strings(["--", prompt.text]));
    Ok(argv)
}
