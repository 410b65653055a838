//! A run that has not run here and is to run in one place: it is closed to all tries but one.

use std::{collections::BTreeSet, time::SystemTime};

use super::{Known, Runs};
use crate::run::{
    Ballot, claim,
    journal::{self, Record},
    standing::{OnFence, Standing},
};

/// Newer nodes that are remembered of one run; with more this one cannot tell.
const MAX_NEWER: usize = 100;

/// Of the run's claims, only those above this ballot and with its nonce are taken.
#[derive(Debug, Clone)]
pub(super) struct Fence {
    pub(super) ballot: Ballot,
    pub(super) at: SystemTime,
    /// A claim of it came to nothing.
    pub(super) aborted: bool,
    /// Ids of nodes newer than the run, which tries have told here that they go to.
    pub(super) claims_on: BTreeSet<String>,
}

/// The answer to a fence.
pub enum Fenced {
    Have {
        slot_id: String,
        generation: u64,
        ended: bool,
    },
    Fenced {
        /// The highest that was shown.
        ballot: Ballot,
        claims_on: BTreeSet<String>,
    },
    Unknown {
        /// The journal was begun after the run was made.
        is_newer: bool,
    },
}

impl Runs {
    /// Closes a run to all tries but that of `ballot`, unless there is a run, and notes the
    /// newer node that the try goes to, if it says one.
    ///
    /// # Errors
    /// [`journal::Error`]: it is not closed.
    pub fn fence(
        &self,
        run_id: &str,
        ballot: Ballot,
        claims_on: Option<String>,
    ) -> Result<Fenced, journal::Error> {
        let mut inner = self.lock();
        let known = inner.known.get(run_id);
        if known.is_none() && self.may_have_forgotten(run_id) {
            let made = claim::made_at(run_id);
            let is_newer = made.is_ok_and(|made| made < self.begun);
            return Ok(Fenced::Unknown { is_newer });
        }
        let before = match known {
            Some(Known::Run(run)) => {
                return Ok(Fenced::Have {
                    slot_id: run.claimed.slot_id.clone(),
                    generation: run.claimed.generation,
                    ended: run.is_over(),
                });
            }
            Some(Known::Past(past)) => {
                return Ok(Fenced::Have {
                    slot_id: past.slot_id.clone(),
                    generation: past.generation,
                    ended: true,
                });
            }
            Some(Known::Fenced(fence)) => Some(fence.clone()),
            None => None,
        };
        let standing = known.map(Known::standing);
        let OnFence::Fenced(highest) = Standing::on_fence(standing.as_ref(), ballot) else {
            unreachable!("only what has run is had")
        };
        let (mut newer, aborted) = before
            .map(|fence| (fence.claims_on, fence.aborted))
            .unwrap_or_default();
        newer.extend(claims_on);
        if newer.len() > MAX_NEWER {
            return Ok(Fenced::Unknown { is_newer: false });
        }
        let fence = Fence {
            ballot: highest,
            at: SystemTime::now(),
            aborted,
            claims_on: newer,
        };
        inner.journal.write(&fence.record(run_id))?;
        let claims_on = fence.claims_on.clone();
        inner.known.insert(run_id.to_owned(), Known::Fenced(fence));
        Ok(Fenced::Fenced {
            ballot: highest,
            claims_on,
        })
    }
}

impl Fence {
    /// After a claim with `ballot` that came to nothing.
    pub(super) fn aborted(ballot: Ballot, at: SystemTime) -> Self {
        Self {
            ballot,
            at,
            aborted: true,
            claims_on: BTreeSet::new(),
        }
    }

    /// Its one record.
    pub(super) fn record(&self, run_id: &str) -> Record {
        Record::Fenced {
            run_id: run_id.to_owned(),
            ballot: self.ballot,
            at: self.at,
            aborted: self.aborted,
            claims_on: self.claims_on.clone(),
        }
    }
}
