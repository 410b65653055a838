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
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    access::Caller,
    audit::{
        self, Audit,
        record::{Operation, Record},
    },
};
use wanted::{Own, Subject, Wanted, Who};

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
    /// Of what is done once it is approved.
    pub record: Arc<Record>,
    /// A run or a call, for sentences.
    pub what: &'static str,
    /// One line of what is wanted.
    pub summary: String,
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
    Own(#[from] Own),
    #[error("this shim is stopping")]
    Stopping,
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
    /// Without what is wanted, which a slow listener must not keep.
    news: broadcast::Sender<Approval>,
    /// The shim stops: nothing waits any longer.
    closed: CancellationToken,
}

#[derive(Debug)]
struct Entry {
    approval: Approval,
    who: Who,
    subject: Arc<Subject>,
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
            closed: CancellationToken::new(),
        }))
    }

    /// Lets nothing wait any longer: whoever waits gets [`Error::Stopping`].
    pub fn close(&self) {
        self.0.closed.cancel();
    }

    /// Lets something wait. That it waits is recorded.
    ///
    /// # Errors
    /// [`Error::Full`] and [`Error::Audit`]
    pub fn ask(&self, wanted: Wanted) -> Result<Waiting, Error> {
        let Wanted {
            record,
            who,
            subject,
        } = wanted;
        let now = SystemTime::now();
        let approval = Approval {
            id: Uuid::now_v7(),
            state: State::Pending,
            record: record.into(),
            what: subject.what(),
            summary: subject.summary(),
            requested_at: now,
            expires_at: now + self.0.timeout,
            decided_by: String::new(),
            comment: String::new(),
        };
        let until = Instant::now() + self.0.timeout;
        let (decided, decision) = oneshot::channel();
        {
            let mut waiting = self.0.waiting.lock();
            let bytes = waiting.values().map(|entry| entry.subject.bytes());
            let bytes = bytes.sum::<usize>() + subject.bytes();
            if waiting.len() >= MAX_WAITING || bytes > MAX_BYTES {
                let record = approval.record.denied(&Error::Full.to_string());
                self.0.audit.record(&record)?;
                return Err(Error::Full);
            }
            let record = approval.record.with(Operation::RequestApproval);
            self.0.audit.record(&record.approval(approval.id))?;
            let entry = Entry {
                approval: approval.clone(),
                who,
                subject: subject.into(),
                decided,
            };
            waiting.insert(approval.id, entry);
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

    /// One that waits, and what is to be approved.
    ///
    /// # Errors
    /// [`Error::NotFound`]
    pub fn get(&self, id: Uuid) -> Result<(Approval, Arc<Subject>), Error> {
        let waiting = self.0.waiting.lock();
        let entry = waiting.get(&id).ok_or_else(|| not_found(id))?;
        Ok((entry.approval.clone(), entry.subject.clone()))
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
        let wanted = &entry.approval.record;
        let operation = match approves {
            true => Operation::Approve,
            false => Operation::Deny,
        };
        let record = wanted.deciding(caller, operation, id, &comment);
        let user_id = wanted.user_id.as_deref();
        if approves && let Err(own) = entry.who.is_somebody_else(user_id, caller) {
            self.0.audit.record(&record.denied(&own.to_string()))?;
            return Err(own.into());
        }
        self.0.audit.record(&record)?;
        let Some(Entry {
            mut approval,
            decided,
            ..
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
        let closed = self.approvals.0.closed.clone();
        let decided = tokio::select! {
            decided = timeout_at(self.until, &mut self.decision) => decided,
            // It is withdrawn.
            () = closed.cancelled() => return Err(Error::Stopping),
        };
        let decided = match decided {
            Ok(decided) => decided.ok(),
            Err(_) if self.approvals.end(id, State::Expired) => None,
            // Somebody decides just now.
            Err(_) => (&mut self.decision).await.ok(),
        };
        let Approval { record, what, .. } = &self.approval;
        let (audit, what) = (&self.approvals.0.audit, *what);
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
                reason: self.approval.reason().into(),
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
        let id = self.approval.id;
        if self.approvals.end(id, State::Withdrawn) {
            let record = self.approval.record.approval(id);
            let record = record.denied("nobody waits for the approval any longer");
            // It does not happen, whether or not that is on record; the log says why it is not.
            let _logged = self.approvals.0.audit.record(&record);
        }
    }
}

impl Approval {
    /// Why it is required.
    #[must_use]
    pub fn reason(&self) -> &str {
        let policy = self.record.policy.as_ref();
        policy.map_or("", |policy| &policy.reason)
    }
}

#[cfg(test)]
mod tests;
