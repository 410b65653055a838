//! What a record says: who did or wanted what, from where, with whose run. It has no secret and no
//! prompt.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{access::Caller, policy::Decided};

/// Longest text of a record, in bytes. Names that callers give are shorter; a longer reason is cut.
const MAX_TEXT: usize = 1024;

/// What was done or wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// A call that no role of the caller allows, whatever its body says.
    Call,
    /// See pools or nodes.
    Look,
    /// Start a run.
    Start,
    /// A call of a tool that the model of an agent wants to make.
    Tool,
    /// Wait for somebody's approval of a run or a call of a tool.
    RequestApproval,
    Approve,
    Deny,
    /// See what waits for an approval.
    SeeApprovals,
    /// Have a credential in the container of a run.
    Inject,
    /// Use a credential's record that is bound to no user.
    Unbound,
    /// See a run.
    See,
    Attach,
    Cancel,
    /// List or watch runs.
    List,
    Lease,
    Release,
    Scale,
    Drain,
    Resume,
    /// Remove images from nodes.
    PruneImages,
    PutCredential,
    ListCredentials,
    DeleteCredential,
    RotateCredentials,
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
    /// What the policy has decided about a run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Box<Decided>>,
    /// The tool and its action, by the names of rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool: Option<String>,
    /// Of what waits or has waited for an approval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Box<OfApproval>>,
}

/// The approval that a record is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfApproval {
    pub id: String,
    /// Who has approved it, by the name that roles know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approved_by: Option<String>,
    /// What whoever decided has said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

impl Record {
    /// Of all users and providers, and allowed.
    #[must_use]
    pub fn new(caller: &Caller, operation: Operation) -> Self {
        Self::of(&caller.name, caller.origin.to_string(), operation)
    }

    /// Of an agent that has asked on a node. `who` has started its run.
    #[must_use]
    pub fn of_agent(who: &str, node_id: &str, tool: &str) -> Self {
        Self {
            tool: named(tool),
            ..Self::of(who, format!("node {node_id}"), Operation::Tool)
        }
    }

    fn of(who: &str, from: String, operation: Operation) -> Self {
        Self {
            who: cut(who),
            from,
            operation,
            user_id: None,
            run_id: None,
            provider: None,
            allowed: true,
            why: None,
            policy: None,
            tool: None,
            approval: None,
        }
    }

    /// The same for what belongs to it.
    #[must_use]
    pub fn with(&self, operation: Operation) -> Self {
        Self {
            operation,
            ..self.clone()
        }
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
    pub fn decided(self, policy: Option<Decided>) -> Self {
        Self {
            policy: policy.map(Box::new),
            ..self
        }
    }

    /// With the approval that it waits for, or is about.
    #[must_use]
    pub fn approval(&self, id: Uuid) -> Self {
        self.of_approval(id, None, None)
    }

    /// With the approval that it has.
    #[must_use]
    pub fn approved(&self, id: Uuid, by: &str) -> Self {
        self.of_approval(id, named(by), None)
    }

    fn of_approval(&self, id: Uuid, approved_by: Option<String>, comment: Option<String>) -> Self {
        let approval = OfApproval {
            id: id.to_string(),
            approved_by,
            comment,
        };
        Self {
            approval: Some(approval.into()),
            ..self.clone()
        }
    }

    /// What somebody else does about the approval of this.
    #[must_use]
    pub fn deciding(&self, caller: &Caller, operation: Operation, id: Uuid, comment: &str) -> Self {
        Self {
            who: cut(&caller.name),
            from: caller.origin.to_string(),
            operation,
            ..self.of_approval(id, None, named(comment))
        }
    }

    #[must_use]
    pub fn denied(&self, why: &str) -> Self {
        Self {
            allowed: false,
            why: Some(cut(why)),
            ..self.clone()
        }
    }
}

impl Record {
    /// Into the ordinary log.
    pub fn log(&self) {
        let Self {
            who,
            from,
            operation,
            user_id,
            run_id,
            provider,
            allowed: _,
            why,
            policy,
            tool,
            approval,
        } = self;
        let tool = tool.as_deref();
        let approval_id = approval.as_ref().map(|approval| &*approval.id);
        let approved_by = approval
            .as_ref()
            .and_then(|approval| approval.approved_by.as_deref());
        let policy = policy.as_ref().map(ToString::to_string);
        let (user_id, run_id) = (user_id.as_deref(), run_id.as_deref());
        let provider = provider.as_deref();
        match why {
            None => tracing::info!(
                caller = %who, %from, ?operation, user_id, run_id, provider, policy, tool, approval_id,
                approved_by, "allowed"
            ),
            Some(why) => tracing::warn!(
                caller = %who, %from, ?operation, user_id, run_id, provider, policy, tool, approval_id,
                why, "denied"
            ),
        }
    }
}

fn named(name: &str) -> Option<String> {
    (!name.is_empty()).then(|| cut(name))
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT)].to_owned()
}
