//! The providers: what each CLI reads as its credential, and how it gets one prompt. The
//! `provider.sh` of the images does the same for `docker run`.

mod anthropic;
mod google;
mod openai;

use std::collections::BTreeMap;

use polydev_proto::{
    exec,
    outside::{File, Outside},
    prompt::{self, Invalid as InvalidPrompt, Options},
    provider::Vendor,
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::value::RawValue;

use crate::secret::{Credential, Invalid, Prepared, PreparedFile};

/// The differences between providers.
struct Table {
    /// Whether a key may come with a project.
    takes_project: bool,
    /// A key, with its project, in the form the CLI reads.
    prepare_key: fn(&SecretString, Option<&str>) -> Prepared,
    /// The variable with which a caller names another server.
    base_url: &'static str,
    /// The file that names it, for a CLI that does not read the variable.
    server_file: Option<fn(&str) -> File>,
    /// Where the CLI keeps an account that has signed in, relative to the home folder.
    oauth_file: &'static str,
    /// Path of the refresh token in that file.
    refresh_token: &'static [&'static str],
    /// Another file that the CLI needs beside the OAuth file.
    oauth_settings: Option<fn() -> File>,
    /// The CLI's argv for one prompt. Without a text, the CLI reads the prompt from stdin.
    prompt: fn(&Prompt, Option<&str>) -> Result<Vec<String>, InvalidPrompt>,
}

/// One prompt for the provider's CLI.
pub struct Prompt<'a> {
    pub text: &'a str,
    /// `None` means the CLI's default.
    pub model: Option<&'a str>,
    /// Its system text and its tools.
    pub options: &'a Options,
}

fn table(provider: Vendor) -> &'static Table {
    match provider {
        Vendor::OpenAi => &openai::TABLE,
        Vendor::Anthropic => &anthropic::TABLE,
        Vendor::Google => &google::TABLE,
    }
}

/// The input of a provider's CLI: a credential, and one prompt.
pub trait Cli {
    /// Where the CLI keeps an account that has signed in, relative to the home folder.
    #[must_use]
    fn account_file(&self) -> &'static str;

    /// Whether a file contains an account that has signed in and that can be refreshed.
    #[must_use]
    fn is_refreshable(&self, file: &[u8]) -> bool;

    /// A credential in the form that the CLI reads.
    ///
    /// # Errors
    /// [`Invalid`] if the provider does not support such a credential.
    fn prepare(&self, credential: &Credential) -> Result<Prepared, Invalid>;

    /// A key that stays outside of the container, and what the CLI reads in its place.
    #[must_use]
    fn prepare_outside(&self, key: &SecretString) -> Prepared;

    /// The variable with which a caller names another server than the provider's.
    #[must_use]
    fn base_url(&self) -> &'static str;

    /// The file from which the CLI reads another server, if it does not read the variable.
    #[must_use]
    fn server_file(&self, url: &str) -> Option<PreparedFile>;

    /// Names in the workspace that the CLI reads only when it starts.
    #[must_use]
    fn reads_at_start(&self) -> &'static [&'static str];

    /// The argv for a prompt. The argv contains the prompt, unless the prompt is longer than
    /// [`exec::PROMPT_IN_ARGV`]: then the CLI reads it from stdin. No shell is involved.
    ///
    /// # Errors
    /// [`InvalidPrompt`]
    fn prompt(&self, prompt: &Prompt) -> Result<Vec<String>, InvalidPrompt>;
}

impl Cli for Vendor {
    fn account_file(&self) -> &'static str {
        table(*self).oauth_file
    }

    fn is_refreshable(&self, file: &[u8]) -> bool {
        let mut value: &RawValue = match serde_json::from_slice(file) {
            Ok(value) => value,
            Err(_) => return false,
        };
        for name in table(*self).refresh_token {
            let members = serde_json::from_str::<BTreeMap<String, &RawValue>>(value.get());
            match members.ok().and_then(|members| members.get(*name).copied()) {
                Some(member) => value = member,
                None => return false,
            }
        }
        // The file contains secrets, so nothing of it is copied.
        value.get().starts_with('"') && value.get().len() > 2 // The quotes.
    }

    fn prepare(&self, credential: &Credential) -> Result<Prepared, Invalid> {
        let table = table(*self);
        Ok(match credential {
            Credential::ApiKey { key, project_id } => {
                if project_id.is_some() && !table.takes_project {
                    return Err(Invalid {
                        field: "secret.api_key.project_id".into(),
                        problem: "must be absent: only `google` has projects",
                    });
                }
                (table.prepare_key)(key, project_id.as_deref())
            }
            Credential::OauthFile(content) => {
                let mut files = vec![PreparedFile {
                    path: table.oauth_file,
                    content: content.clone(),
                }];
                files.extend(table.oauth_settings.map(|file| file().into()));
                Prepared {
                    files,
                    ..Prepared::default()
                }
            }
            Credential::Environment(variables) => {
                let server = variables.get(table.base_url);
                let file = server.and_then(|url| self.server_file(url.expose_secret()));
                Prepared {
                    env: variables.clone().into_iter().collect(),
                    files: file.into_iter().collect(),
                    ..Prepared::default()
                }
            }
        })
    }

    fn prepare_outside(&self, key: &SecretString) -> Prepared {
        let Outside { env, file } = Outside::of(*self);
        let variable = |(name, value): (&str, String)| (name.to_owned(), value.into());
        Prepared {
            env: env.into_iter().map(variable).collect(),
            files: file.into_iter().map(PreparedFile::from).collect(),
            outside: Some((*self, key.clone())),
            ..Prepared::default()
        }
    }

    fn base_url(&self) -> &'static str {
        table(*self).base_url
    }

    fn server_file(&self, url: &str) -> Option<PreparedFile> {
        let file = table(*self).server_file?;
        (!url.is_empty()).then(|| file(url).into())
    }

    fn reads_at_start(&self) -> &'static [&'static str] {
        match self {
            // Claude Code 2.1.332 has none of them in its requests if they come after it has
            // rehearsed. Codex 0.171 and Gemini CLI 0.61 read the others with each session.
            Self::Anthropic => &[
                "AGENTS.md",
                "CLAUDE.local.md",
                "CLAUDE.md",
                ".claude",
                ".git",
                ".mcp.json",
            ],
            Self::OpenAi => &[".codex"],
            Self::Google => &[".env", ".gemini"],
        }
    }

    fn prompt(&self, prompt: &Prompt) -> Result<Vec<String>, InvalidPrompt> {
        prompt::check(prompt.text, prompt.model.unwrap_or_default())?;
        let text = Some(prompt.text).filter(|text| text.len() <= exec::PROMPT_IN_ARGV);
        (table(*self).prompt)(prompt, text)
    }
}

fn strings<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).into()
}

fn variable(name: &str, value: &SecretString) -> (String, SecretString) {
    (name.to_owned(), value.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_that_can_be_refreshed_has_the_token_for_it() {
        let is = |provider: &str, file: &str| {
            let provider = provider.parse::<Vendor>().unwrap();
            provider.is_refreshable(file.as_bytes())
        };
        for (provider, with) in [
            (
                "openai",
                r#"{"OPENAI_API_KEY":null,"tokens":{"refresh_token":"x"}}"#,
            ),
            (
                "anthropic",
                r#" {"claudeAiOauth":{"refreshToken":"x","scopes":[]}}"#,
            ),
            ("google", "{\"refresh_token\":\"x\"}\n"),
        ] {
            assert!(is(provider, with), "{with}");
            for without in [
                with.replace("\"x\"", "\"\""),
                with.replace("\"x\"", "null"),
                with.replace("efresh", "other"),
                with.replace('}', ""),
                format!("[{with}]"),
                "{}".into(),
                String::new(),
            ] {
                assert!(!is(provider, &without), "{without}");
            }
        }
    }

    #[track_caller]
    fn argv(provider: &str, text: &str, model: Option<&str>) -> Vec<String> {
        provider
            .parse::<Vendor>()
            .unwrap()
            .prompt(&Prompt {
                text,
                model,
                options: &Options::default(),
            })
            .unwrap()
    }

    #[test]
    fn a_prompt_is_one_argument_whatever_is_in_it() {
        for provider in Vendor::all() {
            for text in ["$(id) `id`", "--help", "-", "it's \"quoted\"\n"] {
                if provider.name() == "openai" && text == "-" {
                    continue;
                }
                let argv = argv(provider.name(), text, None);
                let last = argv.last().unwrap();
                assert!(
                    last == text || last.strip_prefix("--prompt=") == Some(text),
                    "{argv:?}"
                );
            }
        }
    }

    #[test]
    fn one_shot_forms_are_those_of_the_clis() {
        assert_eq!(
            argv("anthropic", "hi", None),
            ["claude", "-p", "--dangerously-skip-permissions", "--", "hi"]
        );
        assert_eq!(
            argv("anthropic", "hi", Some("opus")),
            [
                "claude",
                "-p",
                "--dangerously-skip-permissions",
                "--model",
                "opus",
                "--",
                "hi"
            ]
        );
        assert_eq!(
            argv("google", "hi", None),
            ["gemini", "--skip-trust", "--yolo", "--prompt=hi"]
        );
        assert_eq!(
            argv("openai", "hi", None),
            [
                "codex",
                "exec",
                "--skip-git-repo-check",
                "--dangerously-bypass-approvals-and-sandbox",
                "--",
                "hi"
            ]
        );
    }

    #[test]
    fn what_a_cli_would_not_take_as_a_prompt_is_refused() {
        let refused = |provider: &str, text, model| {
            let prompt = Prompt {
                text,
                model,
                options: &Options::default(),
            };
            provider
                .parse::<Vendor>()
                .unwrap()
                .prompt(&prompt)
                .unwrap_err()
                .field
        };
        assert_eq!(refused("anthropic", "", None), "prompt.text");
        assert_eq!(refused("google", "hi", Some("--yolo")), "prompt.model");
        assert_eq!(refused("openai", "-", None), "prompt.text");
    }

    #[test]
    fn a_google_key_with_a_project_is_a_vertex_key() {
        let google: Vendor = "google".parse().unwrap();
        let prepare = |project: Option<&str>| {
            let prepared = google.prepare(&key(project)).unwrap();
            let settings = prepared.files[0].content.expose_secret().to_vec();
            let variables = prepared.env.iter();
            let variables =
                variables.map(|(name, value)| format!("{name}={}", value.expose_secret()));
            (
                variables.collect::<Vec<_>>(),
                String::from_utf8(settings).unwrap(),
            )
        };
        let (variables, settings) = prepare(None);
        assert_eq!(variables, ["GEMINI_API_KEY=key"]);
        assert!(settings.contains("gemini-api-key"));
        let (variables, settings) = prepare(Some("project"));
        assert_eq!(variables.len(), 4);
        assert!(variables.contains(&"GOOGLE_CLOUD_PROJECT=project".to_owned()));
        assert!(settings.contains("vertex-ai"));
    }

    fn key(project: Option<&str>) -> Credential {
        Credential::ApiKey {
            key: "key".into(),
            project_id: project.map(str::to_owned),
        }
    }

    #[test]
    fn a_project_is_for_google_alone() {
        for provider in Vendor::all() {
            let prepared = provider.prepare(&key(Some("project")));
            assert_eq!(prepared.is_ok(), provider.name() == "google", "{provider}");
        }
    }

    #[test]
    fn an_account_is_a_file_where_its_cli_looks_for_it() {
        let paths = |provider: &str| {
            let file = Credential::OauthFile(b"{}".to_vec().into());
            let prepared = provider.parse::<Vendor>().unwrap().prepare(&file).unwrap();
            assert!(prepared.env.is_empty());
            prepared.names().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(paths("openai"), [".codex/auth.json"]);
        assert_eq!(paths("anthropic"), [".claude/.credentials.json"]);
        assert_eq!(
            paths("google"),
            [".gemini/oauth_creds.json", ".gemini/settings.json"]
        );
    }

    #[test]
    fn a_server_is_in_the_file_of_a_cli_that_does_not_read_its_variable() {
        let file = |provider: Vendor, url: &str| {
            let file = provider.server_file(url)?;
            let content = file.content.expose_secret().to_vec();
            Some((file.path, String::from_utf8(content).unwrap()))
        };
        let url = "https://gateway.example/v1";
        for provider in [Vendor::Anthropic, Vendor::Google] {
            assert_eq!(file(provider, url), None);
        }
        assert_eq!(file(Vendor::OpenAi, ""), None);
        for (url, line) in [
            (url, "openai_base_url = \"https://gateway.example/v1\"\n"),
            ("x\"\ny = 1", "openai_base_url = \"x\\\"\\u000ay = 1\"\n"),
        ] {
            let (path, content) = file(Vendor::OpenAi, url).unwrap();
            assert_eq!(path, ".codex/config.toml");
            assert!(content.starts_with(line), "{content}");
        }
    }
}
