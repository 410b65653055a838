//! Who may do what: the names of callers, and the roles that a file gives to these names.

mod action;
mod limits;
mod policy;
mod role;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use polydev_proto::provider::Provider;
use polydev_transport::{
    connection::{Known, NOBODY, Origin},
    reload::Reloaded,
};
use serde::Deserialize;

pub use action::{Action, Need, What};
pub use limits::{Asked, TooMuch, default_timeout};
pub use policy::{OverBudget, Policy};
use role::Role;

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The name that roles know: of a [connection](polydev_transport::connection::Caller), or
    /// `sub:` and a token's subject.
    pub name: String,
    /// The user that the caller is, for roles that say `{caller}`. It need not be a valid user
    /// id; then it is nobody's.
    pub user: Option<String>,
    pub origin: Origin,
}

impl Caller {
    /// The caller that a connection names. Its user is the common name or the whole SPIFFE id in
    /// its certificate, or `uid:` and its user id. Nobody knows who else is at the loopback
    /// address.
    #[must_use]
    pub fn of_connection(known: &Known) -> Option<Self> {
        let name = known.caller.0.clone();
        let user = user_of(&name).map(str::to_owned);
        (name != NOBODY).then_some(Self {
            name,
            user,
            origin: known.origin,
        })
    }
}

/// The user that a caller with this name is, if the name says it. An issuer may say another one for a
/// token.
#[must_use]
pub fn user_of(name: &str) -> Option<&str> {
    match name.split_once(':')? {
        ("cn" | "sub", user) => Some(user),
        ("spiffe" | "uid", _) => Some(name),
        _ => None,
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// A role, and what it says about runs.
#[derive(Debug)]
struct Checked {
    role: Role,
    policy: Arc<Policy>,
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
            let policy = role.policy();
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
                what: What::Existing,
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

    /// Whether any role has the caller.
    #[must_use]
    pub fn has_role(&self, caller: &Caller) -> bool {
        let roles = self.roles();
        roles.is_none_or(|roles| roles.iter().any(|checked| checked.role.has(caller)))
    }

    /// Whether any role of the caller may allow such a call, for whatever user and provider.
    ///
    /// # Errors
    /// [`Denied`]
    pub fn may_ever(&self, caller: &Caller, need: Need) -> Result<(), Denied> {
        let Some(roles) = self.roles() else {
            return Ok(());
        };
        let mut own = roles.iter().filter(|checked| checked.role.has(caller));
        match own.any(|checked| checked.role.may_ever(need)) {
            true => Ok(()),
            false => Err(Denied {
                caller: caller.to_string(),
                what: need.to_string(),
            }),
        }
    }

    /// What the first of the caller's roles that allows the action says about runs.
    ///
    /// # Errors
    /// [`Denied`]
    pub fn policy(&self, caller: &Caller, action: Action) -> Result<Arc<Policy>, Denied> {
        let Some(roles) = self.roles() else {
            return Ok(Arc::default());
        };
        let mut own = roles.iter().filter(|checked| checked.role.has(caller));
        let found = own.find(|checked| checked.role.allows(caller, action));
        found
            .map(|checked| checked.policy.clone())
            .ok_or_else(|| Denied {
                caller: caller.to_string(),
                what: action.to_string(),
            })
    }

    /// `None` if everything is allowed.
    fn roles(&self) -> Option<Arc<Vec<Checked>>> {
        let (path, roles) = self.roles.as_ref()?;
        let (roles, refused) = roles.get(|| Self::read(path));
        if let Some(error) = refused {
            let error = crate::chain(&error);
            tracing::warn!(error, "cannot use the new roles, keeping the previous ones");
        }
        Some(roles)
    }
}

#[cfg(test)]
mod tests;
