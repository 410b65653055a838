//! The providers: what each one's CLI reads as its credential, and how it is given
//! one prompt. The images' `provider.sh` say the same to `docker run`.

mod anthropic;
mod google;
mod openai;

use std::{collections::BTreeMap, fmt, str::FromStr};

use crate::credential::{Credential, Prepared};

/// One provider. Its name is the word for it everywhere.
#[derive(Clone, Copy)]
pub struct Provider {
    table: &'static Table,
}

/// What differs between providers.
struct Table {
    name: &'static str,
    /// Another name, as callers of earlier systems have it.
    alias: &'static str,
    /// Variable in which callers keep the key, as documented.
    key_variable: &'static str,
    /// Variable in which callers keep the project, where there is one.
    project_variable: Option<&'static str>,
    /// A credential in the form the CLI reads.
    prepare: fn(&Credential) -> Prepared,
    /// The CLI's one-shot argv.
    prompt: fn(&Prompt) -> Result<Vec<String>, InvalidPrompt>,
}

/// One prompt, to be answered by the provider's CLI.
pub struct Prompt<'a> {
    pub text: &'a str,
    /// The CLI's own choice if `None`.
    pub model: Option<&'a str>,
    /// The caller's environment, for what a CLI takes as an argument alone.
    pub env: &'a BTreeMap<String, String>,
}

/// A prompt that the CLI would not take as one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {problem}")]
pub struct InvalidPrompt {
    pub field: &'static str,
    pub problem: &'static str,
}

/// A name that is no provider's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`provider` is `{given}`, allowed are openai, anthropic, google")]
pub struct Unknown {
    pub given: String,
}

const TABLES: [&Table; 3] = [&openai::TABLE, &anthropic::TABLE, &google::TABLE];

impl Provider {
    /// Every provider, in the order of the documentation.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLES.into_iter().map(|table| Self { table })
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        self.table.name
    }

    #[must_use]
    pub fn key_variable(self) -> &'static str {
        self.table.key_variable
    }

    #[must_use]
    pub fn project_variable(self) -> Option<&'static str> {
        self.table.project_variable
    }

    #[must_use]
    pub fn prepare(self, credential: &Credential) -> Prepared {
        (self.table.prepare)(credential)
    }

    /// The argv that answers a prompt; no shell is involved.
    ///
    /// # Errors
    /// [`InvalidPrompt`]
    pub fn prompt(self, prompt: &Prompt) -> Result<Vec<String>, InvalidPrompt> {
        if prompt.text.is_empty() {
            return Err(InvalidPrompt {
                field: "prompt.text",
                problem: "is empty",
            });
        }
        if prompt.model.is_some_and(|model| model.starts_with('-')) {
            return Err(InvalidPrompt {
                field: "prompt.model",
                problem: "begins with `-`",
            });
        }
        (self.table.prompt)(prompt)
    }
}

impl FromStr for Provider {
    type Err = Unknown;

    fn from_str(given: &str) -> Result<Self, Unknown> {
        let found =
            Self::all().find(|provider| [provider.name(), provider.table.alias].contains(&given));
        found.ok_or_else(|| Unknown {
            given: given.to_owned(),
        })
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn strings<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).into()
}

fn variable(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn argv(provider: &str, text: &str, model: Option<&str>) -> Vec<String> {
        let env = BTreeMap::new();
        provider
            .parse::<Provider>()
            .unwrap()
            .prompt(&Prompt {
                text,
                model,
                env: &env,
            })
            .unwrap()
    }

    #[test]
    fn aliases_are_taken_and_not_given() {
        for (alias, name) in [
            ("codex", "openai"),
            ("claude_code", "anthropic"),
            ("gemini_cli", "google"),
        ] {
            assert_eq!(alias.parse::<Provider>().unwrap().to_string(), name);
        }
        assert!("Codex".parse::<Provider>().is_err());
        assert!("".parse::<Provider>().is_err());
    }

    #[test]
    fn a_prompt_is_one_argument_whatever_is_in_it() {
        for provider in Provider::all() {
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
        assert_eq!(argv("anthropic", "hi", None), ["claude", "-p", "--", "hi"]);
        assert_eq!(
            argv("anthropic", "hi", Some("opus")),
            ["claude", "-p", "--model", "opus", "--", "hi"]
        );
        assert_eq!(
            argv("google", "hi", None),
            ["gemini", "--skip-trust", "--prompt=hi"]
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
        let env = BTreeMap::new();
        let refused = |provider: &str, text, model| {
            let prompt = Prompt {
                text,
                model,
                env: &env,
            };
            provider
                .parse::<Provider>()
                .unwrap()
                .prompt(&prompt)
                .unwrap_err()
                .field
        };
        assert_eq!(refused("anthropic", "", None), "prompt.text");
        assert_eq!(refused("google", "hi", Some("--yolo")), "prompt.model");
        assert_eq!(refused("openai", "-", None), "prompt.text");
        assert_eq!(
            "codecs".parse::<Provider>().unwrap_err().to_string(),
            "`provider` is `codecs`, allowed are openai, anthropic, google"
        );
    }

    #[test]
    fn a_google_key_with_a_project_is_a_vertex_key() {
        let google: Provider = "google".parse().unwrap();
        let prepare =
            |project: &str| google.prepare(&Credential::new("key".into(), project.into()).unwrap());
        let (alone, vertex) = (prepare(""), prepare("project"));
        assert_eq!(
            alone.env,
            BTreeMap::from([variable("GEMINI_API_KEY", "key")])
        );
        assert!(alone.files[0].content.contains("gemini-api-key"));
        assert_eq!(vertex.env.len(), 4);
        assert_eq!(vertex.env["GOOGLE_CLOUD_PROJECT"], "project");
        assert!(vertex.files[0].content.contains("vertex-ai"));
    }

    #[test]
    fn another_openai_server_is_named_in_the_argv() {
        let openai: Provider = "openai".parse().unwrap();
        let with = |url: &str| {
            let env = BTreeMap::from([variable("OPENAI_BASE_URL", url)]);
            openai.prompt(&Prompt {
                text: "hi",
                model: None,
                env: &env,
            })
        };
        let argv = with("http://198.51.100.1/v1").unwrap();
        assert!(
            argv.contains(&"openai_base_url=\"http://198.51.100.1/v1\"".to_owned()),
            "{argv:?}"
        );
        assert!(with("http://x\"\nsandbox_mode=\"").is_err());
    }
}
