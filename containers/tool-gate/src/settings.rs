//! The switches that programs of this kind read from their environment (MVAR 1.5.3). A switch that
//! is not understood here is refused: it would do nothing.

use std::{collections::BTreeMap, fs, path::PathBuf};

use polydev_policy::{
    nonces::{self, Nonces},
    secrets::{NoSecret, Secrets},
    sink::Sinks,
    token::{DEFAULT_TTL_SECONDS, MAX_TTL_SECONDS},
};
use serde_json::{Value, json};

/// Where used tokens are kept if `MVAR_EXEC_TOKEN_NONCE_STORE` does not say.
const DEFAULT_STORE: &str = "data/mvar_execution_token_nonces.jsonl";
/// The secret that the cookbook shows. It is for trying out.
pub const PLACEHOLDER: &str = "change_me_in_prod";
const PREFIX: &str = "MVAR_";

/// What the environment says.
#[derive(Debug, Clone)]
pub struct Settings {
    pub require_token: bool,
    pub require_contract: bool,
    pub one_time: bool,
    pub ttl_seconds: u32,
    pub expected_policy_hash: Option<String>,
    /// Missing if there is none: then what needs one is blocked.
    pub secrets: Option<Secrets>,
    pub is_placeholder: bool,
    store: Option<PathBuf>,
    http_default_deny: bool,
    http_allowlist: Vec<String>,
}

/// Why the environment is refused.
#[derive(Debug, thiserror::Error)]
pub enum Wrong {
    #[error("`{name}` is `{value}`; allowed is {allowed}")]
    Value {
        name: String,
        value: String,
        allowed: &'static str,
    },
    #[error("`{0}` is not a switch of this gate")]
    Unknown(String),
    #[error("both `MVAR_EXEC_TOKEN_SECRET` and `MVAR_EXEC_TOKEN_SECRET_FILE` are set")]
    TwoSecrets,
    #[error("cannot read `{path}` of `MVAR_EXEC_TOKEN_SECRET_FILE`", path = path.display())]
    SecretFile {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(transparent)]
    Secret(#[from] NoSecret),
}

impl Settings {
    /// # Errors
    /// [`Wrong`]
    pub fn read(variables: impl Iterator<Item = (String, String)>) -> Result<Self, Wrong> {
        let mut given: BTreeMap<String, String> = variables
            .filter(|(name, _)| name.starts_with(PREFIX))
            .collect();
        let mut take = |name: &str| given.remove(&format!("{PREFIX}{name}"));
        let switch = |name: &str, value: Option<String>, default| match value.as_deref() {
            None => Ok(default),
            Some("1") => Ok(true),
            Some("0") => Ok(false),
            Some(value) => Err(wrong(name, value, "0 or 1")),
        };
        if !switch("FAIL_CLOSED", take("FAIL_CLOSED"), true)? {
            return Err(wrong("FAIL_CLOSED", "0", "1: what fails here blocks"));
        }
        let ttl = match take("EXECUTION_TOKEN_TTL_SECONDS") {
            None => DEFAULT_TTL_SECONDS,
            Some(value) => {
                let ttl = value
                    .parse()
                    .ok()
                    .filter(|ttl| (1..=MAX_TTL_SECONDS).contains(ttl));
                ttl.ok_or_else(|| {
                    wrong(
                        "EXECUTION_TOKEN_TTL_SECONDS",
                        &value,
                        "1 to 86400, in seconds",
                    )
                })?
            }
        };
        let persist = switch(
            "EXECUTION_TOKEN_NONCE_PERSIST",
            take("EXECUTION_TOKEN_NONCE_PERSIST"),
            false,
        )?;
        let store = take("EXEC_TOKEN_NONCE_STORE").unwrap_or_else(|| DEFAULT_STORE.into());
        let (secrets, is_placeholder) =
            secrets(take("EXEC_TOKEN_SECRET"), take("EXEC_TOKEN_SECRET_FILE"))?;
        let allowlist = take("HTTP_ALLOWLIST").unwrap_or_default();
        let settings = Self {
            require_token: switch(
                "REQUIRE_EXECUTION_TOKEN",
                take("REQUIRE_EXECUTION_TOKEN"),
                false,
            )?,
            require_contract: switch(
                "REQUIRE_EXECUTION_CONTRACT",
                take("REQUIRE_EXECUTION_CONTRACT"),
                false,
            )?,
            one_time: switch(
                "EXECUTION_TOKEN_ONE_TIME",
                take("EXECUTION_TOKEN_ONE_TIME"),
                true,
            )?,
            ttl_seconds: ttl,
            expected_policy_hash: take("EXPECTED_POLICY_HASH").filter(|hash| !hash.is_empty()),
            secrets,
            is_placeholder,
            store: persist.then(|| store.into()),
            http_default_deny: switch("HTTP_DEFAULT_DENY", take("HTTP_DEFAULT_DENY"), false)?,
            http_allowlist: allowlist
                .split(',')
                .map(|host| host.trim().to_ascii_lowercase())
                .filter(|host| !host.is_empty())
                .collect(),
        };
        match given.into_keys().next() {
            Some(unknown) => Err(Wrong::Unknown(unknown)),
            None => Ok(settings),
        }
    }

    /// The store of used tokens.
    ///
    /// # Errors
    /// If its file cannot be opened.
    pub fn nonces(&self) -> Result<Nonces, nonces::Error> {
        match &self.store {
            None => Ok(Nonces::in_memory()),
            Some(path) => Nonces::open(path),
        }
    }

    /// Whether used tokens are remembered beyond this process, or may be used again.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.store.is_some() || !self.one_time
    }

    /// Adds the allow-list to the sink for requests.
    pub fn limit(&self, sinks: &mut Sinks) {
        let Some(mut sink) = sinks.get("http", "post").cloned() else {
            return;
        };
        if !self.http_allowlist.is_empty() {
            sink.metadata.allowed_domains = Some(self.http_allowlist.clone());
        } else if self.http_default_deny {
            // No host has this name (RFC 2606, section 2).
            sink.metadata.allowed_domains = Some(vec!["nothing.invalid".into()]);
        }
        sinks.add(sink);
    }

    /// What decisions depend on, for the policy's hash.
    #[must_use]
    pub fn hashed(&self) -> Value {
        json!({
            "require_token": self.require_token,
            "require_contract": self.require_contract,
            "one_time": self.one_time,
            "ttl_seconds": self.ttl_seconds,
        })
    }
}

/// Secrets, and whether it is the one that everybody knows. An empty one is none.
fn secrets(text: Option<String>, file: Option<String>) -> Result<(Option<Secrets>, bool), Wrong> {
    let text = text.filter(|text| !text.is_empty());
    let text = match (text, file) {
        (Some(_), Some(_)) => return Err(Wrong::TwoSecrets),
        (None, None) => return Ok((None, false)),
        (Some(text), None) => text,
        (None, Some(path)) => fs::read_to_string(&path).map_err(|source| Wrong::SecretFile {
            path: path.into(),
            source,
        })?,
    };
    let is_placeholder = text.lines().any(|line| line.trim() == PLACEHOLDER);
    Ok((Some(Secrets::read(&text)?), is_placeholder))
}

fn wrong(name: &str, value: &str, allowed: &'static str) -> Wrong {
    Wrong::Value {
        name: format!("{PREFIX}{name}"),
        value: value.into(),
        allowed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings, Wrong> {
        let variables = variables
            .iter()
            .map(|(name, value)| (format!("{PREFIX}{name}"), (*value).to_owned()));
        Settings::read(variables.chain([("PATH".into(), "/bin".into())]))
    }

    #[test]
    fn switches_have_the_defaults_of_existing_programs() {
        let settings = read(&[]).unwrap();
        assert!(!settings.require_token && settings.one_time && !settings.require_contract);
        assert_eq!(
            (settings.ttl_seconds, settings.secrets.is_none()),
            (300, true)
        );
        let settings = read(&[
            ("REQUIRE_EXECUTION_TOKEN", "1"),
            ("EXEC_TOKEN_SECRET", PLACEHOLDER),
        ])
        .unwrap();
        assert!(settings.require_token && settings.is_placeholder && settings.secrets.is_some());
        assert!(
            read(&[("EXEC_TOKEN_SECRET", "")])
                .unwrap()
                .secrets
                .is_none()
        );
    }

    #[test]
    fn a_switch_that_would_do_nothing_or_leave_something_open_is_refused() {
        for (name, value, words) in [
            (
                "FAIL_CLOSED",
                "0",
                "`MVAR_FAIL_CLOSED` is `0`; allowed is 1",
            ),
            (
                "REQUIRE_EXECUTION_TOKEN",
                "true",
                "`MVAR_REQUIRE_EXECUTION_TOKEN` is `true`; allowed is 0 or 1",
            ),
            (
                "REQUIRE_SIGNED_POLICY_BUNDLE",
                "0",
                "`MVAR_REQUIRE_SIGNED_POLICY_BUNDLE` is not a switch",
            ),
            ("EXECUTION_TOKEN_TTL_SECONDS", "0", "allowed is 1 to 86400"),
            ("EXEC_TOKEN_SECRET", "short", "has 5 bytes, at least 16"),
            (
                "EXEC_TOKEN_SECRET_FILE",
                "/nowhere",
                "cannot read `/nowhere`",
            ),
        ] {
            let refused = read(&[(name, value)]).unwrap_err().to_string();
            assert!(refused.contains(words), "{refused}");
        }
    }

    #[test]
    fn hosts_for_requests_are_listed() {
        let domains = |variables: &[(&str, &str)]| {
            let mut sinks = Sinks::common();
            read(variables).unwrap().limit(&mut sinks);
            sinks
                .get("http", "post")
                .unwrap()
                .metadata
                .allowed_domains
                .clone()
                .unwrap()
        };
        assert!(domains(&[]).is_empty());
        assert_eq!(
            domains(&[("HTTP_ALLOWLIST", "A.example, *.b.example,")]),
            ["a.example", "*.b.example"]
        );
        assert_eq!(domains(&[("HTTP_DEFAULT_DENY", "1")]), ["nothing.invalid"]);
    }
}
