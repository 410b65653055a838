//! What a caller may want to do.

use std::fmt;

use polydev_proto::provider::Provider;

/// What a caller wants to do.
#[derive(Debug, Clone, Copy)]
pub enum Action<'a> {
    /// See pools and nodes.
    Look,
    /// Start, see or end runs of a user for a provider. `None` stands for all users, or for all
    /// providers.
    Run {
        what: What,
        user_id: Option<&'a str>,
        provider: Option<Provider>,
    },
    /// Have a credential of a user in the container of a run. A run whose key is at the broker
    /// has none.
    Inject {
        what: What,
        user_id: &'a str,
        provider: Provider,
        /// Whether the call itself brings the credential in the clear. Whoever has a stored one
        /// in a container can read it.
        is_given: bool,
    },
    /// Use a record of an earlier system, which is bound to no user, as a user's.
    Unbound {
        user_id: &'a str,
        provider: Provider,
    },
    /// Set the size of a pool.
    Scale { provider: Provider },
    /// Remove images from nodes.
    Images,
    /// See, grant or deny approvals. `None` means the same as for runs.
    Approve {
        user_id: Option<&'a str>,
        provider: Option<Provider>,
    },
    /// Put, see or delete credentials. `None` means the same as for runs.
    Credentials {
        user_id: Option<&'a str>,
        provider: Option<Provider>,
    },
}

/// Which run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// One that starts with a prompt.
    Prompt,
    /// One that starts with a command of the caller's.
    Command,
    /// One that exists, or a slot for a later run.
    Existing,
}

/// What a call may need, before it is known for whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Look,
    Run,
    Scale,
    Images,
    Approve,
    Credentials,
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Look => "see pools and nodes",
            Self::Run => "start, see or end runs",
            Self::Scale => "set the size of pools",
            Self::Images => "remove images from nodes",
            Self::Approve => "see, grant or deny approvals",
            Self::Credentials => "put, see or delete credentials",
        })
    }
}

impl fmt::Display for Action<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, user_id, provider) = match self {
            Self::Look => return f.write_str("see pools and nodes"),
            Self::Run {
                what,
                user_id,
                provider,
            } => {
                let what = match what {
                    What::Prompt => "start prompts",
                    What::Command => "start commands",
                    What::Existing => "start, see or end runs",
                };
                (what, user_id, provider)
            }
            Self::Inject {
                user_id,
                provider,
                is_given,
                ..
            } => {
                let which = match is_given {
                    true => "credentials",
                    false => "stored or sealed credentials",
                };
                return write!(
                    f,
                    "put {which} into containers (`inject`) for user `{user_id}` and `{provider}`"
                );
            }
            Self::Unbound { user_id, provider } => {
                return write!(
                    f,
                    "use records of earlier systems, which are bound to no user (`unbound`), \
                     for user `{user_id}` and `{provider}`"
                );
            }
            Self::Scale { provider } => {
                return write!(f, "set the size of the pool of `{provider}`");
            }
            Self::Images => return f.write_str("remove images from nodes"),
            Self::Approve { user_id, provider } => {
                ("see, grant or deny approvals", user_id, provider)
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
