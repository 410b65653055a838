//! A user's credential, while the shim has it: for one call.

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use polydev_proto::{node, runtime};
use zeroize::Zeroizing;

/// Longest key or project. Real ones are a tenth of it.
const LONGEST: usize = 4096;

/// An API key, and for some providers the project it is billed to. It cannot be printed.
pub struct Credential {
    pub api_key: Zeroizing<String>,
    pub project_id: Option<String>,
}

/// A credential in the form that the provider's CLI reads; see `provider`.
#[derive(Default)]
pub struct Prepared {
    pub env: BTreeMap<String, String>,
    pub files: Vec<File>,
}

/// A file below the home, for its user alone.
pub struct File {
    pub path: &'static str,
    pub content: String,
}

/// Why a credential is refused; never quotes it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`credential.{field}` {problem}")]
pub struct Invalid {
    pub field: &'static str,
    pub problem: &'static str,
}

impl Credential {
    /// # Errors
    /// [`Invalid`]
    pub fn new(api_key: String, project_id: String) -> Result<Self, Invalid> {
        let api_key = Zeroizing::new(api_key);
        let check = |field, value: &str| match value {
            value if value.len() > LONGEST => Err(Invalid {
                field,
                problem: "is longer than 4096 bytes",
            }),
            value if value.chars().any(char::is_control) => Err(Invalid {
                field,
                problem: "has a control character, such as a newline",
            }),
            _ => Ok(()),
        };
        if api_key.is_empty() {
            return Err(Invalid {
                field: "api_key",
                problem: "is empty",
            });
        }
        check("api_key", &api_key)?;
        check("project_id", &project_id)?;
        let project_id = Some(project_id).filter(|project| !project.is_empty());
        Ok(Self {
            api_key,
            project_id,
        })
    }

    /// # Errors
    /// [`Invalid`]
    pub fn parse(message: runtime::Credential) -> Result<Self, Invalid> {
        Self::new(message.api_key, message.project_id)
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            api_key: _,
            project_id,
        } = self; // A new field must be judged here.
        f.debug_struct("Credential")
            .field("project_id", project_id)
            .finish_non_exhaustive()
    }
}

impl From<Prepared> for node::Secrets {
    fn from(prepared: Prepared) -> Self {
        let file = |file: File| node::SecretFile {
            path: file.path.to_owned(),
            content: Bytes::from(file.content),
        };
        Self {
            env: prepared.env,
            files: prepared.files.into_iter().map(file).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_is_never_printed() {
        let credential = Credential::new("hunter2".into(), "project".into()).unwrap();
        let printed = format!("{credential:?}");
        assert!(
            !printed.contains("hunter2") && printed.contains("project"),
            "{printed}"
        );
        let refused = Credential::new("hunter2\n".into(), String::new()).unwrap_err();
        assert!(!refused.to_string().contains("hunter2"));
    }

    #[test]
    fn wrong_credentials_are_refused_by_field() {
        let field = |key: &str, project: &str| {
            Credential::new(key.into(), project.into())
                .unwrap_err()
                .field
        };
        assert_eq!(field("", ""), "api_key");
        assert_eq!(field("a\r\nb", ""), "api_key");
        assert_eq!(field(&"x".repeat(LONGEST + 1), ""), "api_key");
        assert_eq!(field("key", "a\tb"), "project_id");
    }
}
