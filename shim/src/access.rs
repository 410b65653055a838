//! Who may do what: the names of callers, and the roles that a file gives to these names.

mod policy;

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use polydev_proto::provider::{Provider, Unknown};
pub use polydev_transport::connection::Caller;
use polydev_transport::{reload::Reloaded, upstream::Upstream};
use serde::{Deserialize, Deserializer};
use wildmatch::WildMatch;

pub use policy::{Asked, OverBudget, Policy, TooMuch};

/// What a caller wants to do.
#[derive(Debug, Clone, Copy)]
pub enum Action<'a> {
    /// See pools and nodes.
    Look,
    /// Start, see or end runs of a user for a provider. `None` stands for all users, or for all
    /// providers.
    Run {
        user_id: Option<&'a str>,
        provider: Option<Provider>,
    },
    /// Have a credential of a user in a container. A run whose key is at the broker has none.
    Inject {
        user_id: &'a str,
        provider: Provider,
    },
    /// Set the size of a pool.
    Scale { provider: Provider },
    /// Put, see or delete credentials. `None` means the same as for runs.
    Credentials {
        user_id: Option<&'a str>,
        provider: Option<Provider>,
    },
}

/// What a role allows its members to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Right {
    Run,
    Scale,
    Credentials,
}

/// One `[[role]]` of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Role {
    /// Names of callers. `*` stands for any characters, `?` for one character.
    members: Vec<String>,
    may: Vec<Right>,
    /// Users that the members may act for, with the same wildcards.
    #[serde(default = "all")]
    users: Vec<String>,
    /// Any names of providers. An empty list means all providers.
    #[serde(default, deserialize_with = "providers")]
    providers: Vec<Provider>,
    /// Whether credentials of the members' runs may be in containers.
    #[serde(default = "yes")]
    inject: bool,
    budget: Option<policy::Budget>,
    /// Rules for what the members' runs may reach beside their model.
    egress: Option<Vec<String>>,
    /// By the name of a provider.
    #[serde(default)]
    upstream: BTreeMap<String, Upstream>,
    /// What the models of the members' prompts may use.
    tools: Option<policy::Tools>,
}

/// A role, and what it says about runs.
#[derive(Debug)]
struct Checked {
    role: Role,
    policy: Arc<Policy>,
}

fn yes() -> bool {
    true
}

fn all() -> Vec<String> {
    vec!["*".into()]
}

fn providers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Provider>, D::Error> {
    let named = Vec::<Named>::deserialize(deserializer)?;
    Ok(named.into_iter().map(|Named(provider)| provider).collect())
}

#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Named(Provider);

impl TryFrom<String> for Named {
    type Error = Unknown;

    fn try_from(name: String) -> Result<Self, Unknown> {
        name.parse().map(Self)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    role: Vec<Role>,
}

/// What callers may do.
#[derive(Debug)]
pub struct Access {
    /// `None` allows everything to every caller who can connect.
    roles: Option<(PathBuf, Reloaded<Vec<Checked>>)>,
}

/// Why the roles cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the roles in `{path}`")]
    Unreadable {
        path: String,
        source: std::io::Error,
    },
    #[error("the roles in `{path}` are not valid")]
    Malformed {
        path: String,
        source: toml::de::Error,
    },
    #[error("role {number} in `{path}` is not valid")]
    Policy {
        path: String,
        /// From 1, in the order of the file.
        number: usize,
        source: policy::Invalid,
    },
}

/// No role of the caller allows the action.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("caller `{caller}` has no role that allows them to {what}")]
pub struct Denied {
    pub caller: String,
    pub what: String,
}

impl Access {
    /// Allows everything to every caller; for listeners that only this machine reaches.
    #[must_use]
    pub fn everything() -> Self {
        Self { roles: None }
    }

    /// Reads roles from a TOML file, and reads the file again when it changes.
    ///
    /// # Errors
    /// [`Error`]
    pub fn load(path: &Path) -> Result<Self, Error> {
        let roles = Reloaded::new(vec![path.to_owned()], || Self::read(path))?;
        Ok(Self {
            roles: Some((path.to_owned(), roles)),
        })
    }

    fn read(path: &Path) -> Result<Vec<Checked>, Error> {
        let shown = || path.display().to_string();
        let text = fs::read_to_string(path).map_err(|source| Error::Unreadable {
            path: shown(),
            source,
        })?;
        let file: File = toml::from_str(&text).map_err(|source| Error::Malformed {
            path: shown(),
            source,
        })?;
        let check = |(at, mut role): (usize, Role)| {
            let upstream = std::mem::take(&mut role.upstream);
            let egress = role.egress.take();
            let policy = Policy::check(role.inject, role.budget, egress, upstream, role.tools);
            let policy = policy.map_err(|source| Error::Policy {
                path: shown(),
                number: at + 1,
                source,
            })?;
            Ok(Checked {
                role,
                policy: policy.into(),
            })
        };
        file.role.into_iter().enumerate().map(check).collect()
    }

    /// The providers for which the caller may have runs of the user.
    #[must_use]
    pub fn providers_of(&self, caller: &Caller, user_id: &str) -> Vec<Provider> {
        let may = |provider: &Provider| {
            let run = Action::Run {
                user_id: Some(user_id),
                provider: Some(*provider),
            };
            self.check(caller, run).is_ok()
        };
        Provider::all().filter(may).collect()
    }

    /// # Errors
    /// [`Denied`]
    pub fn check(&self, caller: &Caller, action: Action) -> Result<(), Denied> {
        self.policy(caller, action).map(drop)
    }

    /// What the first of the caller's roles that allows the action says about runs.
    ///
    /// # Errors
    /// [`Denied`]
    pub fn policy(&self, caller: &Caller, action: Action) -> Result<Arc<Policy>, Denied> {
        let Some((path, roles)) = &self.roles else {
            return Ok(Arc::default());
        };
        let (roles, refused) = roles.get(|| Self::read(path));
        if let Some(error) = refused {
            let error = crate::chain(&error);
            tracing::warn!(error, "cannot use the new roles, keeping the previous ones");
        }
        let mut own = roles.iter().filter(|checked| checked.role.has(caller));
        let found = own.find(|checked| checked.role.allows(action));
        found
            .map(|checked| checked.policy.clone())
            .ok_or_else(|| Denied {
                caller: caller.to_string(),
                what: action.to_string(),
            })
    }
}

impl Role {
    fn has(&self, caller: &Caller) -> bool {
        matches(&self.members, &caller.0)
    }

    fn allows(&self, action: Action) -> bool {
        let may = |right| self.may.contains(&right);
        match action {
            Action::Look => true,
            Action::Run { user_id, provider } => {
                may(Right::Run) && self.is_for(user_id) && self.is_of(provider)
            }
            Action::Inject { user_id, provider } => {
                let run = Action::Run {
                    user_id: Some(user_id),
                    provider: Some(provider),
                };
                self.inject && self.allows(run)
            }
            Action::Scale { provider } => may(Right::Scale) && self.is_of(Some(provider)),
            Action::Credentials { user_id, provider } => {
                may(Right::Credentials) && self.is_for(user_id) && self.is_of(provider)
            }
        }
    }

    /// A call without a user needs a role for all users.
    fn is_for(&self, user_id: Option<&str>) -> bool {
        match user_id {
            Some(user_id) => matches(&self.users, user_id),
            None => self.users.iter().any(|user| user == "*"),
        }
    }

    /// A call without a provider needs a role for all providers.
    fn is_of(&self, provider: Option<Provider>) -> bool {
        match provider {
            Some(provider) => self.providers.is_empty() || self.providers.contains(&provider),
            None => {
                let has = |provider: &Provider| self.providers.contains(provider);
                self.providers.is_empty() || Provider::all().all(|provider| has(&provider))
            }
        }
    }
}

fn matches(patterns: &[String], name: &str) -> bool {
    let mut patterns = patterns.iter();
    patterns.any(|pattern| WildMatch::new(pattern).matches(name))
}

impl fmt::Display for Action<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, user_id, provider) = match self {
            Self::Look => return f.write_str("see pools and nodes"),
            Self::Run { user_id, provider } => ("start, see or end runs", user_id, provider),
            Self::Inject { user_id, provider } => {
                let what = "put credentials into containers";
                return write!(f, "{what} (`inject`) for user `{user_id}` and `{provider}`");
            }
            Self::Scale { provider } => {
                return write!(f, "set the size of the pool of `{provider}`");
            }
            Self::Credentials { user_id, provider } => {
                ("put, see or delete credentials", user_id, provider)
            }
        };
        match user_id {
            Some(user_id) => write!(f, "{what} of user `{user_id}`")?,
            None => write!(f, "{what} of all users")?,
        }
        match provider {
            Some(provider) => write!(f, " for `{provider}`"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
