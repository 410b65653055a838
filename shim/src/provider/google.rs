//! Gemini CLI.

use super::{InvalidPrompt, Prompt, Table, strings, variable};
use crate::credential::{Credential, File, Prepared};

pub(super) const TABLE: Table = Table {
    name: "google",
    alias: "gemini_cli",
    key_variable: "GOOGLE_API_KEY",
    project_variable: Some("GOOGLE_PROJECT_ID"),
    prepare,
    prompt,
};

/// A key alone is a Gemini API key, a key with a project one of Vertex AI. The CLI
/// does not guess: its settings must name the way to sign in.
fn prepare(credential: &Credential) -> Prepared {
    let key = &credential.api_key;
    let (env, auth) = match &credential.project_id {
        None => ([variable("GEMINI_API_KEY", key)].into(), "gemini-api-key"),
        Some(project) => (
            [
                variable("GOOGLE_API_KEY", key),
                variable("GOOGLE_GENAI_USE_VERTEXAI", "true"),
                variable("GOOGLE_CLOUD_PROJECT", project),
                variable("GOOGLE_PROJECT_ID", project),
            ]
            .into(),
            "vertex-ai",
        ),
    };
    let content = format!("{{\"security\":{{\"auth\":{{\"selectedType\":\"{auth}\"}}}}}}\n");
    Prepared {
        env,
        files: vec![File {
            path: ".gemini/settings.json",
            content,
        }],
    }
}

fn prompt(prompt: &Prompt) -> Result<Vec<String>, InvalidPrompt> {
    let mut argv = strings(["gemini", "--skip-trust"]);
    if let Some(model) = prompt.model {
        argv.extend(strings(["-m", model]));
    }
    // In one word, because a prompt may begin with a dash.
    argv.push(format!("--prompt={}", prompt.text));
    Ok(argv)
}
