//! The credential that the command line gets: from a file, or from the variable that the
//! provider documents. It never comes in an argument, which every process on the machine can
//! read.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use base64::{Engine, prelude::BASE64_STANDARD};
use polydev_proto::{
    provider::Vendor,
    runtime::{
        ApiKey, Credential, ScryptRecord, Secret, SecretEnvironment, credential::Source,
        secret::Kind,
    },
};

/// Where the credential is. Without any of these options the provider's variable is read:
/// OPENAI_API_KEY, ANTHROPIC_API_KEY or GOOGLE_API_KEY (and GOOGLE_PROJECT_ID).
#[derive(clap::Args)]
#[group(multiple = false)]
pub struct Given {
    /// File with the API key. If no file with a credential is given, the provider's variable is
    /// read: OPENAI_API_KEY, ANTHROPIC_API_KEY or GOOGLE_API_KEY (and GOOGLE_PROJECT_ID).
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// File in which the provider's CLI keeps an account that has signed in: ~/.codex/auth.json,
    /// ~/.claude/.credentials.json or ~/.gemini/oauth_creds.json.
    #[arg(long, value_name = "FILE")]
    oauth_file: Option<PathBuf>,
    /// File with environment variables, one NAME=VALUE per line. The command gets them unchanged.
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,
    /// File with the output of `credentials seal`.
    #[arg(long, value_name = "FILE")]
    sealed_file: Option<PathBuf>,
    /// File with a record of an earlier system: a JSON object with `encrypted`, `iv`, `authTag`
    /// and `salt`.
    #[arg(long, value_name = "FILE")]
    scrypt_file: Option<PathBuf>,
}

/// A record as earlier systems print it.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Scrypt {
    encrypted: String,
    iv: String,
    auth_tag: String,
    salt: String,
    /// Every record has the same value.
    #[serde(default, rename = "algorithm")]
    _algorithm: Option<String>,
}

impl Given {
    /// Reads the credential; `None` if none is given.
    pub(crate) fn read(&self, provider: Vendor) -> anyhow::Result<Option<Credential>> {
        let source = match self {
            Self {
                sealed_file: Some(path),
                ..
            } => {
                let record = BASE64_STANDARD.decode(text("--sealed-file", path)?.trim());
                let record = record.context("`--sealed-file` must contain base64")?;
                Some(Source::SealedRecord(record.into()))
            }
            Self {
                scrypt_file: Some(path),
                ..
            } => {
                let record = serde_json::from_str(&text("--scrypt-file", path)?);
                let Scrypt {
                    encrypted,
                    iv,
                    auth_tag,
                    salt,
                    ..
                } = record.context("`--scrypt-file` does not contain a valid record")?;
                Some(Source::ScryptRecord(ScryptRecord {
                    encrypted,
                    iv,
                    auth_tag,
                    salt,
                }))
            }
            clear => clear.secret(provider)?.map(Source::Secret),
        };
        Ok(source.map(|source| Credential {
            source: Some(source),
        }))
    }

    /// Whether a file with a credential is given.
    pub(crate) fn is_given(&self) -> bool {
        let files = [&self.key_file, &self.oauth_file, &self.env_file];
        self.is_sealed() || files.into_iter().any(Option::is_some)
    }

    /// Whether the credential is a sealed record.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.sealed_file.is_some() || self.scrypt_file.is_some()
    }

    /// The secret that is given in the clear; `None` if none is.
    ///
    /// # Errors
    /// If a file cannot be read or parsed.
    pub fn secret(&self, provider: Vendor) -> anyhow::Result<Option<Secret>> {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let api_key = |key: String| {
            let project_id = project_variable(provider).and_then(variable);
            Kind::ApiKey(ApiKey {
                key,
                project_id: project_id.unwrap_or_default(),
            })
        };
        let kind = if let Some(path) = &self.key_file {
            Some(api_key(text("--key-file", path)?.trim().to_owned()))
        } else if let Some(path) = &self.oauth_file {
            Some(Kind::OauthFile(text("--oauth-file", path)?.into()))
        } else if let Some(path) = &self.env_file {
            Some(Kind::Environment(environment(&text("--env-file", path)?)?))
        } else {
            variable(key_variable(provider)).map(api_key)
        };
        Ok(kind.map(|kind| Secret { kind: Some(kind) }))
    }
}

/// The documented variable for the provider's API key.
pub(super) fn key_variable(provider: Vendor) -> &'static str {
    match provider {
        Vendor::OpenAi => "OPENAI_API_KEY",
        Vendor::Anthropic => "ANTHROPIC_API_KEY",
        Vendor::Google => "GOOGLE_API_KEY",
    }
}

/// The documented variable for the provider's project; `None` for providers without projects.
fn project_variable(provider: Vendor) -> Option<&'static str> {
    match provider {
        Vendor::OpenAi | Vendor::Anthropic => None,
        Vendor::Google => Some("GOOGLE_PROJECT_ID"),
    }
}

fn text(option: &str, path: &Path) -> anyhow::Result<String> {
    let text = fs::read_to_string(path);
    text.with_context(|| format!("cannot read {option} `{}`", path.display()))
}

/// Parses lines as `docker run --env-file` does, except that a name without a value is an error.
fn environment(text: &str) -> anyhow::Result<SecretEnvironment> {
    let mut environment = SecretEnvironment::default();
    for (line, number) in text.lines().zip(1..) {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((name, value)) = line.split_once('=') else {
            bail!("line {number} of `--env-file` is not NAME=VALUE");
        };
        let variables = &mut environment.variables;
        if variables
            .insert(name.to_owned(), value.to_owned())
            .is_some()
        {
            bail!("line {number} of `--env-file` sets `{name}` again");
        }
    }
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_lines_and_what_is_not_understood_is_not_quoted() {
        let read = environment("# of a test\n\nA=1\nB==2 \n").unwrap();
        let expected = [("A", "1"), ("B", "=2 ")];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(read.variables, expected.into());
        for wrong in ["hunter2", "A=hunter2\nA=hunter2"] {
            let refused = environment(wrong).unwrap_err().to_string();
            assert!(
                refused.contains("line") && !refused.contains("hunter2"),
                "{refused}"
            );
        }
    }
}
