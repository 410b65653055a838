//! Who may do what: the names of callers, and the roles that a file gives to these names.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use polydev_proto::provider::{Provider, Unknown};
pub use polydev_transport::connection::Caller;
use polydev_transport::reload::Reloaded;
use serde::{Deserialize, Deserializer};
use wildmatch::WildMatch;

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
    roles: Option<(PathBuf, Reloaded<Vec<Role>>)>,
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

    fn read(path: &Path) -> Result<Vec<Role>, Error> {
        let shown = || path.display().to_string();
        let text = fs::read_to_string(path).map_err(|source| Error::Unreadable {
            path: shown(),
            source,
        })?;
        let file: File = toml::from_str(&text).map_err(|source| Error::Malformed {
            path: shown(),
            source,
        })?;
        Ok(file.role)
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
        let Some((path, roles)) = &self.roles else {
            return Ok(());
        };
        let (roles, refused) = roles.get(|| Self::read(path));
        if let Some(error) = refused {
            let error = crate::chain(&error);
            tracing::warn!(error, "cannot use the new roles, keeping the previous ones");
        }
        let mut own = roles.iter().filter(|role| role.has(caller));
        if own.any(|role| role.allows(action)) {
            return Ok(());
        }
        Err(Denied {
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
mod tests {
    use super::*;

    const FILE: &str = r#"
        [[role]]
        members = ["spiffe://acme/controller", "uid:0"]
        may = ["run", "credentials"]

        [[role]]
        members = ["cn:team-?"]
        may = ["run"]
        users = ["team-*"]
        providers = ["openai"]

        [[role]]
        members = ["cn:admin"]
        may = ["scale"]
        providers = ["codex"]

        [[role]]
        members = ["cn:agents"]
        may = ["run"]
        inject = false
    "#;

    fn load(text: &str) -> Result<Access, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        Access::load(file.path())
    }

    #[test]
    fn callers_may_do_what_a_role_of_theirs_says_and_nothing_else() {
        let access = load(FILE).unwrap();
        let provider = |name: &str| name.parse::<Provider>().unwrap();
        let may = |caller: &str, action| access.check(&Caller(caller.into()), action).is_ok();
        let run = |user_id, name| Action::Run {
            user_id: Some(user_id),
            provider: Some(provider(name)),
        };
        let everybodys = Action::Run {
            user_id: None,
            provider: None,
        };
        let credentials = |user_id| Action::Credentials {
            user_id: Some(user_id),
            provider: None,
        };
        let of = |user_id| Action::Run {
            user_id: Some(user_id),
            provider: None,
        };
        let scale = |name| Action::Scale {
            provider: provider(name),
        };
        for name in ["spiffe://acme/controller", "uid:0"] {
            assert!(may(name, run("alice", "google")) && may(name, everybodys));
            assert!(may(name, credentials("alice")) && may(name, Action::Look));
            assert!(!may(name, scale("openai")));
        }
        assert!(may("cn:team-a", run("team-alice", "openai")));
        assert!(!may("cn:team-a", run("team-alice", "google")));
        assert!(!may("cn:team-a", of("team-alice")), "of all providers");
        let providers = access.providers_of(&Caller("cn:team-a".into()), "team-alice");
        assert_eq!(providers, [provider("openai")]);
        assert!(!may("cn:team-a", run("alice", "openai")));
        assert!(!may("cn:team-a", everybodys) && !may("cn:team-a", credentials("team-alice")));
        assert!(may("cn:admin", scale("openai")) && !may("cn:admin", scale("google")));
        assert!(may("cn:admin", Action::Look) && !may("cn:admin", run("alice", "openai")));
        for name in ["cn:team-", "cn:team-ab", "uid:00", "loopback", ""] {
            assert!(!may(name, Action::Look), "{name}");
        }
        assert!(
            Access::everything()
                .check(&Caller("loopback".into()), everybodys)
                .is_ok()
        );
    }

    #[test]
    fn a_role_can_keep_credentials_out_of_containers() {
        let access = load(FILE).unwrap();
        let may = |caller: &str| {
            let inject = Action::Inject {
                user_id: "team-alice",
                provider: Provider::OpenAi,
            };
            access.check(&Caller(caller.into()), inject).is_ok()
        };
        assert!(may("uid:0") && may("cn:team-a"));
        assert!(!may("cn:agents") && !may("cn:admin"));
    }

    #[test]
    fn what_was_denied_is_said() {
        let access = load(FILE).unwrap();
        let run = Action::Run {
            user_id: Some("bob"),
            provider: Some("google".parse().unwrap()),
        };
        let denied = access.check(&Caller("cn:team-a".into()), run).unwrap_err();
        let words = "caller `cn:team-a` has no role that allows them to start, see or end runs of \
                     user `bob` for `google`";
        assert_eq!(denied.to_string(), words);
    }

    #[test]
    fn roles_that_are_not_understood_are_refused() {
        for wrong in [
            "",
            "[[role]]\nmembers = [\"cn:a\"]",
            "[[role]]\nmembers = [\"cn:a\"]\nmay = [\"fly\"]",
            "[[role]]\nmembers = [\"cn:a\"]\nmay = [\"run\"]\nuser = [\"a\"]",
            "[[role]]\nmembers = [\"cn:a\"]\nmay = [\"run\"]\nproviders = [\"openia\"]",
        ] {
            assert!(load(wrong).is_err(), "{wrong}");
        }
        assert!(Access::load(Path::new("/nowhere")).is_err());
    }
}
