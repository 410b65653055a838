//! A task's own credentials for a registry.

use serde::{Deserialize, de::IgnoredAny};

use super::value::text;

/// Credentials for a registry. Either part may be empty: some registries take a token in
/// place of a name and a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Auth {
    pub username: String,
    pub password: String,
    pub server_address: Option<String>,
}

/// Leaves the password out of logs.
impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth")
            .field("username", &self.username)
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAuth {
    username: Option<String>,
    password: Option<String>,
    server_address: Option<String>,
    #[serde(rename = "email")]
    _email: Option<IgnoredAny>,
}

impl From<RawAuth> for Auth {
    fn from(given: RawAuth) -> Self {
        Self {
            username: given.username.unwrap_or_default(),
            password: given.password.unwrap_or_default(),
            server_address: text(given.server_address),
        }
    }
}
