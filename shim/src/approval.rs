//! What waits for somebody's approval at this shim: runs that wait here, and calls of tools that
//! agents want to make. Whoever waits has a [`Waiting`]; without it nobody can approve any longer.
//! Nothing of it outlives the shim: the callers of runs try again, and drivers repeat the calls.
//!
//! [`wanted`] is what somebody wants, and [`webhook`] tells others of it.

pub mod wanted;
pub mod webhook;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::{
    sync::{broadcast, oneshot},
    time::{Instant, timeout_at},
};
use uuid::Uuid;

use crate::{
    access::Caller,
    audit::{self, Audit, record::Operation},
};
use wanted::{Stranger, Wanted};

/// Most that may wait at a time.
pub const MAX_WAITING: usize = 1000;
/// Most bytes of what waits.
const MAX_BYTES: usize = 64 << 20;
/// Longest comment of somebody who decides, in bytes.
pub const MAX_COMMENT: usize = 1000;
/// News that a slow listener may be behind.
const MAX_NEWS: usize = 1024;

/// Where an approval is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Pending,
    Approved,
    Denied,
    /// Nobody has decided in time.
    Expired,
    /// Nobody waits for it any longer.
    Withdrawn,
}

/// An approval, as it is now.
#[derive(Debug, Clone)]
pub struct Approval {
    pub id: Uuid,
    pub state: State,
    pub wanted: Arc<Wanted>,
    pub requested_at: SystemTime,
    pub expires_at: SystemTime,
    /// Who has approved or denied it; empty until then.
    pub decided_by: String,
    pub comment: String,
}

/// Why something is not approved, or cannot be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{by}` has denied this {what}{}", said(comment))]
    Denied {
        what: &'static str,
        by: String,
        comment: String,
    },
    #[error("nobody has approved this {what} within {} s: {reason}", waited.as_secs())]
    Expired {
        what: &'static str,
        reason: String,
        waited: Duration,
    },
    #[error(
        "{MAX_WAITING} approvals, or {} MiB of them, wait at this shim already",
        MAX_BYTES >> 20
    )]
    Full,
    #[error("no approval `{id}` waits at this shim; it may be over, or wait at another shim")]
    NotFound { id: String },
    #[error(transparent)]
    Own(#[from] Stranger),
    #[error(transparent)]
    Audit(#[from] audit::Error),
}

fn said(comment: &str) -> String {
    match comment {
        "" => String::new(),
        comment => format!(": {comment}"),
    }
}

/// The approvals of a shim; clones share them.
#[derive(Debug, Clone)]
pub struct Approvals(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// How long somebody may take to decide.
    timeout: Duration,
    audit: Audit,
    waiting: Mutex<BTreeMap<Uuid, Entry>>,
    news: broadcast::Sender<Approval>,
}

#[derive(Debug)]
struct Entry {
    approval: Approval,
    decided: oneshot::Sender<Approval>,
}

impl Approvals {
    #[must_use]
    pub fn new(timeout: Duration, audit: Audit) -> Self {
        Self(Arc::new(Inner {
            timeout,
            audit,
            waiting: Mutex::default(),
            news: broadcast::Sender::new(MAX_NEWS),
        }))
    }

    /// Lets something wait. That it waits is recorded.
    ///
    /// # Errors
    /// [`Error::Full`] and [`Error::Audit`]
    pub fn ask(&self, wanted: Wanted) -> Result<Waiting, Error> {
        let now = SystemTime::now();
        let approval = Approval {
            id: Uuid::now_v7(),
            state: State::Pending,
            wanted: wanted.into(),
            requested_at: now,
            expires_at: now + self.0.timeout,
            decided_by: String::new(),
            comment: String::new(),
        };
        let until = Instant::now() + self.0.timeout;
        let (decided, decision) = oneshot::channel();
        {
            let mut waiting = self.0.waiting.lock();
            let bytes = waiting.values().map(|entry| entry.approval.wanted.bytes());
            let bytes = bytes.sum::<usize>() + approval.wanted.bytes();
            if waiting.len() >= MAX_WAITING || bytes > MAX_BYTES {
                return Err(Error::Full);
            }
            let record = approval.wanted.record.with(Operation::RequestApproval);
            self.0.audit.record(&record.approval(approval.id))?;
            let approval = approval.clone();
            waiting.insert(approval.id, Entry { approval, decided });
        }
        self.tell(approval.clone());
        Ok(Waiting {
            approvals: self.clone(),
            approval,
            until,
            decision,
        })
    }

    /// All that wait, the oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<Approval> {
        let waiting = self.0.waiting.lock();
        waiting
            .values()
            .map(|entry| entry.approval.clone())
            .collect()
    }

    /// Each that comes or ends, from now on.
    #[must_use]
    pub fn news(&self) -> broadcast::Receiver<Approval> {
        self.0.news.subscribe()
    }

    /// # Errors
    /// [`Error::NotFound`]
    pub fn get(&self, id: Uuid) -> Result<Approval, Error> {
        let waiting = self.0.waiting.lock();
        let entry = waiting.get(&id).ok_or_else(|| not_found(id))?;
        Ok(entry.approval.clone())
    }

    /// Approves or denies what waits. It is recorded first.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Own`] and [`Error::Audit`]
    pub fn decide(
        &self,
        caller: &Caller,
        id: Uuid,
        approves: bool,
        comment: String,
    ) -> Result<Approval, Error> {
        let mut waiting = self.0.waiting.lock();
        let entry = waiting.get(&id).ok_or_else(|| not_found(id))?;
        let wanted = &entry.approval.wanted;
        let operation = match approves {
            true => Operation::Approve,
            false => Operation::Deny,
        };
        let record = wanted.record.deciding(caller, operation, id, &comment);
        if approves && let Err(own) = wanted.is_for_a_stranger(caller) {
            self.0.audit.record(&record.denied(&own.to_string()))?;
            return Err(own.into());
        }
        self.0.audit.record(&record)?;
        let Some(Entry {
            mut approval,
            decided,
        }) = waiting.remove(&id)
        else {
            return Err(not_found(id));
        };
        drop(waiting);
        approval.state = match approves {
            true => State::Approved,
            false => State::Denied,
        };
        approval.decided_by.clone_from(&caller.name);
        approval.comment = comment;
        // Whoever has waited may be gone: then nothing happens.
        let _gone = decided.send(approval.clone());
        self.tell(approval.clone());
        Ok(approval)
    }

    /// Ends one that nobody has decided about. Returns whether there was one.
    fn end(&self, id: Uuid, state: State) -> bool {
        let Some(Entry { mut approval, .. }) = self.0.waiting.lock().remove(&id) else {
            return false;
        };
        approval.state = state;
        self.tell(approval);
        true
    }

    fn tell(&self, approval: Approval) {
        // Often there is no listener.
        let _listeners = self.0.news.send(approval);
    }
}

fn not_found(id: Uuid) -> Error {
    Error::NotFound { id: id.to_string() }
}

/// Somebody waits. Drop withdraws it.
#[derive(Debug)]
pub struct Waiting {
    approvals: Approvals,
    pub approval: Approval,
    until: Instant,
    decision: oneshot::Receiver<Approval>,
}

impl Waiting {
    /// Waits until somebody has approved it, and records what is done then. Returns who has.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::Expired`] and [`Error::Audit`]: it must not be done.
    ///
    /// # Cancel safety
    /// Nobody can approve it any longer.
    pub async fn approved(mut self) -> Result<Approval, Error> {
        let id = self.approval.id;
        let decided = match timeout_at(self.until, &mut self.decision).await {
            Ok(decided) => decided.ok(),
            Err(_) if self.approvals.end(id, State::Expired) => None,
            // Somebody has decided just now.
            Err(_) => self.decision.try_recv().ok(),
        };
        let wanted = &self.approval.wanted;
        let (audit, record) = (&self.approvals.0.audit, &wanted.record);
        let what = wanted.what();
        let refused = match decided {
            Some(decided) if decided.state == State::Approved => {
                audit.record(&record.approved(id, &decided.decided_by))?;
                return Ok(decided);
            }
            Some(decided) => Error::Denied {
                what,
                by: decided.decided_by,
                comment: decided.comment,
            },
            None => Error::Expired {
                what,
                reason: wanted.reason().into(),
                waited: self.approvals.0.timeout,
            },
        };
        audit.record(&record.approval(id).denied(&refused.to_string()))?;
        Err(refused)
    }

    /// The time that is left.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.approvals.end(self.approval.id, State::Withdrawn);
    }
}

#[cfg(test)]
mod tests;
