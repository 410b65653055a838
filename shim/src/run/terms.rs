//! What holds for a run by the role of its caller, and which slots it can have.

use std::{collections::BTreeSet, sync::Arc};

use polydev_proto::{broker, budget::Used, id::UserId};

use crate::{
    access::{OverBudget, Policy},
    pool::{Candidate, POLICY_VERSION, View},
};

/// Most slots that are looked at for one that is for the run.
const MAX_UNFIT: usize = 64;

/// The terms of a run, which may wait for its slot for long.
#[derive(Debug, Clone)]
pub struct Terms {
    pub role: Arc<Policy>,
    pub user_id: UserId,
    /// Whether its key is at the broker: only such runs are held to a budget.
    pub has_outside_key: bool,
}

impl Terms {
    /// What the broker is told, with what the user has used until now.
    ///
    /// # Errors
    /// [`OverBudget`]
    pub fn policy(&self, view: &View) -> Result<Option<broker::Policy>, OverBudget> {
        let used = || match self.has_outside_key {
            true => view.used(&self.user_id),
            false => Used::default(),
        };
        self.role.of_run(&self.user_id, used)
    }

    /// The slot, or another idle one of the same pool, that is for this run.
    ///
    /// # Errors
    /// Why the slot is not, if a short search finds no other.
    pub(super) fn fitting(&self, view: &View, slot: Candidate) -> Result<Candidate, &'static str> {
        let Some(reason) = self.misfit(&slot) else {
            return Ok(slot);
        };
        // It came out of turn: the pool's slots are for the next run in the queue.
        if slot.on_demand {
            return Err(reason);
        }
        // While they are kept, they are not offered again.
        let mut unfit = vec![slot];
        while unfit.len() < MAX_UNFIT {
            let next = view.idle_beyond(&unfit[0].provider, &BTreeSet::new());
            match next.ok_or(reason)? {
                next if self.misfit(&next).is_none() => return Ok(next),
                next => unfit.push(next),
            }
        }
        Err(reason)
    }

    /// Why a slot is not for this run, although another one may be; `None` if it is.
    pub(super) fn misfit(&self, slot: &Candidate) -> Option<&'static str> {
        if slot.on_demand && slot.exceeds_pool() {
            return Some(
                "the slot on demand may reach more than the pool: set `egress` of its job, too",
            );
        }
        if self.role.says_anything() && slot.broker_version < POLICY_VERSION {
            return Some(
                "upgrade the node's driver: it does not know `budget`, `egress` and `upstream` of roles",
            );
        }
        if self.role.restricts_egress() && slot.egress.is_none() {
            return Some(
                "the caller's role has `egress`, and the slot has a network: its job must have a list \
                 in `egress.allow`",
            );
        }
        None
    }
}
