//! A credential in the clear, for one call: as the user gave it, and in the form that the
//! provider's CLI reads.
//!
//! Secrets are in types that cannot be printed and are wiped when dropped.

use std::collections::BTreeMap;

use bytes::Bytes;
use polydev_proto::{
    broker::{Key, Keys},
    init::{File, MAX_REFRESHED, Refreshable, Secrets, Variable},
    outside,
    provider::Vendor,
    runtime::{self, CredentialKind, secret},
};
use prost::Message;
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use zeroize::Zeroizing;

use crate::environment;

/// The longest key or project, in bytes. Real ones have a tenth of this length.
const MAX_KEY: usize = 4096;
/// The longest account file, in bytes. Real ones have a tenth of this length.
const MAX_FILE: usize = MAX_REFRESHED;
/// The largest number of variables, and of bytes in their names and values together.
const MAX_VARIABLES: usize = 100;
const MAX_ENVIRONMENT: usize = 128 << 10;

/// A credential in the clear.
#[derive(Debug)]
pub enum Credential {
    /// A key, and for some providers the project it is billed to.
    ApiKey {
        key: SecretString,
        project_id: Option<String>,
    },
    /// The file in which the provider's CLI keeps an account that has signed in.
    OauthFile(SecretSlice<u8>),
    /// Variables with any names except those of the runtime and of loaders.
    Environment(BTreeMap<String, SecretString>),
}

/// A credential in the form that the provider's CLI reads; see `provider`.
#[derive(Debug, Default)]
pub struct Prepared {
    pub env: Vec<(String, SecretString)>,
    pub files: Vec<PreparedFile>,
    /// A key for the node's broker. The container does not get it.
    pub outside: Option<(Vendor, SecretString)>,
    /// Which of the files the shim wants back when the CLI has refreshed it.
    pub refreshable: Option<Refreshable>,
}

/// A file in the home folder that only its user can read.
#[derive(Debug)]
pub struct PreparedFile {
    pub path: &'static str,
    pub content: SecretSlice<u8>,
}

impl From<outside::File> for PreparedFile {
    fn from(file: outside::File) -> Self {
        Self {
            path: file.path,
            content: file.content.into_bytes().into(),
        }
    }
}

/// Why a credential is refused. Never quotes the credential.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`credential.{field}` {problem}")]
pub struct Invalid {
    pub field: String,
    pub problem: &'static str,
}

pub(crate) fn invalid(field: impl Into<String>, problem: &'static str) -> Invalid {
    Invalid {
        field: field.into(),
        problem,
    }
}

impl Credential {
    /// # Errors
    /// [`Invalid`] for the first field that is wrong.
    pub fn parse(secret: runtime::Secret) -> Result<Self, Invalid> {
        // Moves the values into types that wipe them, before any check.
        let credential = match secret.kind {
            None => {
                let problem = "is missing: allowed are `api_key`, `oauth_file` and `environment`";
                return Err(invalid("secret.kind", problem));
            }
            Some(secret::Kind::ApiKey(runtime::ApiKey { key, project_id })) => Self::ApiKey {
                key: key.into(),
                project_id: Some(project_id).filter(|project| !project.is_empty()),
            },
            Some(secret::Kind::OauthFile(file)) => Self::OauthFile(file.to_vec().into()),
            Some(secret::Kind::Environment(environment)) => {
                let variables = environment.variables.into_iter();
                Self::Environment(
                    variables
                        .map(|(name, value)| (name, value.into()))
                        .collect(),
                )
            }
        };
        credential.check()?;
        Ok(credential)
    }

    /// # Errors
    /// [`Invalid`] for the first field that is wrong.
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        match self {
            Self::ApiKey { key, project_id } => {
                let key = key.expose_secret();
                if key.is_empty() {
                    return Err(invalid("secret.api_key.key", "is empty"));
                }
                check_text("secret.api_key.key", key)?;
                let project_id = project_id.as_deref().unwrap_or_default();
                check_text("secret.api_key.project_id", project_id)
            }
            Self::OauthFile(content) => {
                let (field, content) = ("secret.oauth_file", content.expose_secret());
                if content.len() > MAX_FILE {
                    return Err(invalid(field, "is longer than 65536 bytes"));
                }
                let is_object = content.trim_ascii_start().first() == Some(&b'{')
                    && serde_json::from_slice::<serde::de::IgnoredAny>(content).is_ok();
                match is_object {
                    true => Ok(()),
                    false => Err(invalid(field, "is not a JSON object")),
                }
            }
            Self::Environment(variables) => check_environment(variables),
        }
    }

    /// The kind of the credential.
    #[must_use]
    pub fn kind(&self) -> CredentialKind {
        match self {
            Self::ApiKey { .. } => CredentialKind::ApiKey,
            Self::OauthFile(_) => CredentialKind::OauthFile,
            Self::Environment(_) => CredentialKind::Environment,
        }
    }

    /// The form that [`Credential::decode`] reads: one `polydev.runtime.v1.Secret`.
    pub(crate) fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut secret = runtime::Secret {
            kind: Some(match self {
                Self::ApiKey { key, project_id } => secret::Kind::ApiKey(runtime::ApiKey {
                    key: key.expose_secret().to_owned(),
                    project_id: project_id.clone().unwrap_or_default(),
                }),
                Self::OauthFile(content) => secret::Kind::OauthFile(wiped(content.clone())),
                Self::Environment(variables) => {
                    let variable = |(name, value): (&String, &SecretString)| {
                        (name.clone(), value.expose_secret().to_owned())
                    };
                    let variables = variables.iter().map(variable).collect();
                    secret::Kind::Environment(runtime::SecretEnvironment { variables })
                }
            }),
        };
        let encoded = Zeroizing::new(secret.encode_to_vec());
        // Wipes the copies in the message.
        match &mut secret.kind {
            Some(secret::Kind::ApiKey(api_key)) => {
                drop(Zeroizing::new(std::mem::take(&mut api_key.key)))
            }
            Some(secret::Kind::Environment(environment)) => {
                let variables = std::mem::take(&mut environment.variables);
                variables.into_values().map(Zeroizing::new).for_each(drop);
            }
            Some(secret::Kind::OauthFile(_)) | None => {}
        }
        encoded
    }

    /// `None` if the bytes are not a credential.
    pub(crate) fn decode(encoded: Zeroizing<Vec<u8>>) -> Option<Self> {
        let secret = runtime::Secret::decode(Bytes::from_owner(encoded)).ok()?;
        Self::parse(secret).ok()
    }
}

fn check_text(field: &str, value: &str) -> Result<(), Invalid> {
    if value.len() > MAX_KEY {
        return Err(invalid(field, "is longer than 4096 bytes"));
    }
    if value.chars().any(char::is_control) {
        return Err(invalid(
            field,
            "contains a control character, such as a newline",
        ));
    }
    Ok(())
}

fn check_environment(variables: &BTreeMap<String, SecretString>) -> Result<(), Invalid> {
    const FIELD: &str = "secret.environment.variables";
    if variables.is_empty() {
        return Err(invalid(FIELD, "is empty"));
    }
    if variables.len() > MAX_VARIABLES {
        return Err(invalid(FIELD, "has more than 100 entries"));
    }
    let mut total = 0;
    for (name, value) in variables {
        let field = || format!("{FIELD}[{name:?}]");
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(invalid(field(), "has a name that is empty or contains `=`"));
        }
        if let Err(refused) = environment::check_secret(name) {
            return Err(invalid(field(), refused.reason));
        }
        let value = value.expose_secret();
        if value.contains('\0') {
            return Err(invalid(field(), "contains a NUL byte"));
        }
        total += name.len() + value.len();
    }
    if total > MAX_ENVIRONMENT {
        return Err(invalid(FIELD, "has more than 131072 bytes"));
    }
    Ok(())
}

impl Prepared {
    /// Names of the variables and paths of the files.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let variables = self.env.iter().map(|(name, _)| name.as_str());
        variables.chain(self.files.iter().map(|file| file.path))
    }

    /// Whether there are neither variables nor files.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.env.is_empty() && self.files.is_empty()
    }

    /// The form that the broker reads; wiped when dropped. `None` without a key for it.
    #[must_use]
    pub fn keys(&self) -> Option<Keys> {
        let (provider, key) = self.outside.as_ref()?;
        let key = Key {
            provider: provider.to_string(),
            value: wiped(key.expose_secret().as_bytes().to_vec().into()),
        };
        Some(Keys { keys: vec![key] })
    }

    /// The form that init reads; wiped when dropped.
    #[must_use]
    pub fn secrets(&self) -> Secrets {
        let variable = |(name, value): &(String, SecretString)| Variable {
            name: Bytes::copy_from_slice(name.as_bytes()),
            value: wiped(value.expose_secret().as_bytes().to_vec().into()),
        };
        let file = |file: &PreparedFile| File {
            path: file.path.to_owned(),
            mode: 0o600,
            content: wiped(file.content.clone()),
        };
        Secrets {
            env: self.env.iter().map(variable).collect(),
            files: self.files.iter().map(file).collect(),
            refreshable: self.refreshable.clone(),
        }
    }
}

/// Bytes that are wiped when their last owner drops them.
fn wiped(secret: SecretSlice<u8>) -> Bytes {
    struct Owner(SecretSlice<u8>);
    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            self.0.expose_secret()
        }
    }
    Bytes::from_owner(Owner(secret))
}

#[cfg(test)]
mod tests {
    use super::*;
    use polydev_proto::runtime::{ApiKey, Secret, SecretEnvironment};

    fn api_key(key: &str, project_id: &str) -> Secret {
        let (key, project_id) = (key.to_owned(), project_id.to_owned());
        Secret {
            kind: Some(secret::Kind::ApiKey(ApiKey { key, project_id })),
        }
    }

    fn oauth_file(content: &[u8]) -> Secret {
        Secret {
            kind: Some(secret::Kind::OauthFile(content.to_vec().into())),
        }
    }

    fn environment(variables: &[(&str, &str)]) -> Secret {
        let variables = variables.iter();
        let variables = variables.map(|(name, value)| ((*name).into(), (*value).into()));
        let variables = variables.collect();
        Secret {
            kind: Some(secret::Kind::Environment(SecretEnvironment { variables })),
        }
    }

    #[test]
    fn a_credential_is_never_printed() {
        for secret in [
            api_key("hunter2", ""),
            oauth_file(b"{\"token\":\"hunter2\"}"),
            environment(&[("TOKEN", "hunter2")]),
        ] {
            let credential = Credential::parse(secret).unwrap();
            assert!(!format!("{credential:?}").contains("hunter2"));
        }
        let refused = Credential::parse(api_key("hunter2\n", "")).unwrap_err();
        assert!(!refused.to_string().contains("hunter2"));
    }

    #[test]
    fn wrong_credentials_are_refused_by_field() {
        #[track_caller]
        fn refused(secret: Secret, field: &str) {
            let refused = Credential::parse(secret).unwrap_err();
            assert_eq!(refused.field, field, "{refused}");
        }
        refused(Secret { kind: None }, "secret.kind");
        for key in ["", "a\r\nb", &"x".repeat(MAX_KEY + 1)] {
            refused(api_key(key, ""), "secret.api_key.key");
        }
        refused(api_key("key", "a\tb"), "secret.api_key.project_id");
        let long = format!("{{\"a\":\"{}\"}}", "x".repeat(MAX_FILE));
        for content in ["", "[]", "{", "{\"a\":}", &long] {
            refused(oauth_file(content.as_bytes()), "secret.oauth_file");
        }
        let variables = "secret.environment.variables";
        refused(environment(&[]), variables);
        refused(
            environment(&[("A", &"x".repeat(MAX_ENVIRONMENT))]),
            variables,
        );
        let names: Vec<_> = (0..=MAX_VARIABLES).map(|n| format!("A{n}")).collect();
        let many: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
        refused(environment(&many), variables);
        for name in ["", "A=B", "LD_PRELOAD", "NODE_OPTIONS", "USER_ID", "HOME"] {
            let field = format!("{variables}[{name:?}]");
            refused(environment(&[(name, "x")]), &field);
        }
        refused(environment(&[("A", "x\0")]), &format!("{variables}[\"A\"]"));
    }

    #[test]
    fn every_kind_is_decoded_as_it_was_encoded() {
        for secret in [
            api_key("key", "project"),
            oauth_file(b"{}"),
            environment(&[("OPENAI_API_KEY", "key"), ("TOKEN", "\u{20ac}\n")]),
        ] {
            let credential = Credential::parse(secret.clone()).unwrap();
            let encoded = credential.encode();
            assert_eq!(runtime::Secret::decode(&encoded[..]).unwrap(), secret);
            let decoded = Credential::decode(encoded).unwrap();
            assert_eq!(decoded.encode(), credential.encode());
        }
        assert!(Credential::decode(Zeroizing::new(vec![0xff])).is_none());
    }
}
