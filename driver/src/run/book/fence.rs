//! Fences: a run that has not run here, and may run in one place only, is closed to all
//! tries but one.

use std::{collections::BTreeSet, time::SystemTime};

use polydev_proto::id::{Generation, RunId, SlotId};

use super::{Known, Runs};
use crate::run::{
    Ballot,
    journal::{self, Record},
    standing::{OnFence, Standing},
};

/// Most newer nodes that are remembered per run; with more, this node cannot decide.
const MAX_NEWER: usize = 100;

/// Accepts only claims above this ballot that have its nonce.
#[derive(Debug, Clone)]
pub(super) struct Fence {
    pub(super) ballot: Ballot,
    pub(super) at: SystemTime,
    /// Whether a claim of the run failed before its start.
    pub(super) aborted: bool,
    /// Ids of the nodes, newer than the run, that tries have announced they will claim on.
    pub(super) claims_on: BTreeSet<String>,
}

/// The response to a fence.
pub enum Fenced {
    Have {
        slot_id: SlotId,
        generation: Generation,
        ended: bool,
    },
    Fenced {
        /// The highest ballot seen.
        ballot: Ballot,
        claims_on: BTreeSet<String>,
    },
    Unknown {
        /// Whether the journal was started after the run id was made.
        is_newer: bool,
    },
}

impl Runs {
    /// Closes a run to all tries but the one of `ballot`, unless the run is here. Records
    /// the newer node that the try announces, if any.
    ///
    /// # Errors
    /// [`journal::Error`]; the run is not closed.
    pub fn fence(
        &self,
        run_id: RunId,
        ballot: Ballot,
        claims_on: Option<String>,
    ) -> Result<Fenced, journal::Error> {
        let mut inner = self.lock();
        let known = inner.known.get(&run_id);
        if known.is_none() && self.may_have_forgotten(run_id) {
            let is_newer = run_id.made_at() < self.begun;
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
            unreachable!("only a run that has run here is `Have`")
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
        inner.known.insert(run_id, Known::Fenced(fence));
        Ok(Fenced::Fenced {
            ballot: highest,
            claims_on,
        })
    }
}

impl Fence {
    /// The fence after a claim with `ballot` that failed before its start.
    pub(super) fn aborted(ballot: Ballot, at: SystemTime) -> Self {
        Self {
            ballot,
            at,
            aborted: true,
            claims_on: BTreeSet::new(),
        }
    }

    /// Its only journal record.
    pub(super) fn record(&self, run_id: RunId) -> Record {
        Record::Fenced {
            run_id,
            ballot: self.ballot,
            at: self.at,
            aborted: self.aborted,
            claims_on: self.claims_on.clone(),
        }
    }
}
