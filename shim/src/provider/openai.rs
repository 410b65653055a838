//! Codex CLI.

use polydev_proto::outside::File;
use secrecy::SecretString;

use super::{InvalidPrompt, Prompt, Table, strings, variable};
use crate::secret::Prepared;

pub(super) const TABLE: Table = Table {
    takes_project: false,
    prepare_key,
    base_url: "OPENAI_BASE_URL",
    server_file: Some(File::codex_server),
    oauth_file: ".codex/auth.json",
    refresh_token: &["tokens", "refresh_token"],
    oauth_settings: None,
    prompt,
};

/// Codex reads its key only from `CODEX_API_KEY`; scripts use the documented name.
fn prepare_key(key: &SecretString, _project: Option<&str>) -> Prepared {
    let env = vec![
        variable("OPENAI_API_KEY", key),
        variable("CODEX_API_KEY", key),
    ];
    Prepared {
        env,
        ..Prepared::default()
    }
}

fn prompt(prompt: &Prompt, text: Option<&str>) -> Result<Vec<String>, InvalidPrompt> {
    if text == Some("-") {
        return Err(InvalidPrompt {
            field: "prompt.text",
            problem: "is `-`, which makes Codex read stdin",
        });
    }
    // The container is the sandbox: Codex's own cannot work without capabilities.
    let mut argv = strings([
        "codex",
        "exec",
        "--skip-git-repo-check",
        "--dangerously-bypass-approvals-and-sandbox",
    ]);
    if let Some(model) = prompt.model {
        argv.extend(strings(["-m", model]));
    }
    argv.extend(prompt.options.args.iter().cloned());
    argv.extend(strings(["--", text.unwrap_or("-")]));
    Ok(argv)
}
