//! What a record says: who did or wanted what, from where, with whose run. It has no secret and no
//! prompt.

use serde::{Deserialize, Serialize};

use crate::access::{Action, Caller, What};
use polydev_proto::provider::Provider;

/// Longest text of a record, in bytes. Names that callers give are shorter; a longer reason is cut.
const MAX_TEXT: usize = 1024;

/// What was done or wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// A call that no role of the caller allows, whatever its body says.
    Call,
    Look,
    /// Start a run.
    Start,
    /// Have a credential in the container of a run.
    Inject,
    /// Use a record that is bound to no user.
    Unbound,
    See,
    Attach,
    Cancel,
    /// List or watch runs, of one user or of all.
    List,
    Lease,
    Release,
    /// Use a user's runs, before it is known how.
    Runs,
    Scale,
    Credentials,
}

/// One record. Missing names stand for all users, or for all providers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The caller's name, as roles know it.
    pub who: String,
    /// An address, or a process of this machine.
    pub from: String,
    pub operation: Operation,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    /// A run or a lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    pub allowed: bool,
    /// Why it is not allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Record {
    /// Something that the caller may do.
    #[must_use]
    pub fn allowed(caller: &Caller, operation: Operation) -> Self {
        Self {
            who: cut(&caller.name),
            from: caller.origin.to_string(),
            operation,
            user_id: None,
            run_id: None,
            provider: None,
            allowed: true,
            why: None,
        }
    }

    /// The same for an action of a role, before it is known how far it comes.
    #[must_use]
    pub fn of(caller: &Caller, action: Action) -> Self {
        let (operation, user_id, provider) = match action {
            Action::Look => (Operation::Look, None, None),
            Action::Run {
                what,
                user_id,
                provider,
            } => {
                let operation = match what {
                    What::Prompt | What::Command => Operation::Start,
                    What::Existing => Operation::Runs,
                };
                (operation, user_id, provider)
            }
            Action::Inject {
                user_id, provider, ..
            } => (Operation::Inject, Some(user_id), Some(provider)),
            Action::Unbound { user_id, provider } => {
                (Operation::Unbound, Some(user_id), Some(provider))
            }
            Action::Scale { provider } => (Operation::Scale, None, Some(provider)),
            Action::Credentials { user_id, provider } => {
                (Operation::Credentials, user_id, provider)
            }
        };
        Self::allowed(caller, operation)
            .user(user_id.unwrap_or_default())
            .provider(provider.map_or("", Provider::name))
    }

    #[must_use]
    pub fn user(self, user_id: &str) -> Self {
        Self {
            user_id: named(user_id),
            ..self
        }
    }

    #[must_use]
    pub fn run(self, run_id: &str) -> Self {
        Self {
            run_id: named(run_id),
            ..self
        }
    }

    #[must_use]
    pub fn provider(self, provider: &str) -> Self {
        Self {
            provider: named(provider),
            ..self
        }
    }

    #[must_use]
    pub fn denied(self, why: &str) -> Self {
        Self {
            allowed: false,
            why: Some(cut(why)),
            ..self
        }
    }
}

fn named(name: &str) -> Option<String> {
    (!name.is_empty()).then(|| cut(name))
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT)].to_owned()
}
