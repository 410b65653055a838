//! Gemini CLI.

use polydev_proto::outside::{File, GEMINI_KEY};
use secrecy::SecretString;

use super::{InvalidPrompt, Prompt, Table, strings, variable};
use crate::secret::Prepared;

pub(super) const TABLE: Table = Table {
    takes_project: true,
    prepare_key,
    base_url: "GOOGLE_GEMINI_BASE_URL",
    server_file: None,
    oauth_file: ".gemini/oauth_creds.json",
    refresh_token: &["refresh_token"],
    oauth_settings: Some(|| settings(ACCOUNT)),
    prompt,
};

/// Settings that choose one way to sign in.
fn settings(content: &str) -> File {
    File {
        path: ".gemini/settings.json",
        content: content.to_owned(),
    }
}

const VERTEX: &str = "{\"security\":{\"auth\":{\"selectedType\":\"vertex-ai\"}}}\n";
const ACCOUNT: &str = "{\"security\":{\"auth\":{\"selectedType\":\"oauth-personal\"}}}\n";

/// A key alone is a Gemini API key; a key with a project is a Vertex AI key. The CLI does not
/// guess: its settings must name the way to sign in.
fn prepare_key(key: &SecretString, project: Option<&str>) -> Prepared {
    let (env, settings) = match project {
        None => (vec![variable("GEMINI_API_KEY", key)], GEMINI_KEY),
        Some(project) => {
            let project = SecretString::from(project);
            let env = vec![
                variable("GOOGLE_API_KEY", key),
                variable("GOOGLE_GENAI_USE_VERTEXAI", &"true".into()),
                variable("GOOGLE_CLOUD_PROJECT", &project),
                variable("GOOGLE_PROJECT_ID", &project),
            ];
            (env, VERTEX)
        }
    };
    Prepared {
        env,
        files: vec![self::settings(settings).into()],
        ..Prepared::default()
    }
}

fn prompt(prompt: &Prompt, text: Option<&str>) -> Result<Vec<String>, InvalidPrompt> {
    // The container is the sandbox.
    let mut argv = strings(["gemini", "--skip-trust", "--yolo"]);
    if let Some(model) = prompt.model {
        argv.extend(strings(["-m", model]));
    }
    argv.extend(prompt.options.args.iter().cloned());
    // One argument, because a prompt may begin with a dash.
    argv.extend(text.map(|text| format!("--prompt={text}")));
    Ok(argv)
}
