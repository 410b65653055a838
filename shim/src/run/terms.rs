//! What holds for a run by the role of its caller, and which slots it can have.

use std::sync::Arc;

use polydev_proto::{broker, budget::Used, id::UserId};

use super::Error;
use crate::{
    access::{OverBudget, Policy},
    pool::{Candidate, View},
};

/// Since this version of the protocol between driver and broker, both know what roles say.
const POLICY_VERSION: u32 = 4;

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

    /// Why a slot is not for this run, although another one may be; `None` if it is.
    ///
    /// # Errors
    /// [`Error::Refused`] if no slot of the pool is.
    pub(super) fn misfit(&self, slot: &Candidate) -> Result<Option<&'static str>, Error> {
        if slot.on_demand && slot.exceeds_pool() {
            return Ok(Some(
                "the slot on demand may reach more than the pool: set `egress` of its job, too",
            ));
        }
        if !self.role.says_anything() {
            return Ok(None);
        }
        if slot.broker_version < POLICY_VERSION {
            return Ok(Some(
                "upgrade the node's driver: it does not know `budget`, `egress` and `upstream` of roles",
            ));
        }
        if self.role.restricts_egress() && slot.egress.is_none() {
            let reason = "the caller's role has `egress`, and the slot has a network: its job must \
                          have a list in `egress.allow`";
            return match slot.has_listed_peer() {
                true => Ok(Some(reason)),
                false => Err(Error::Refused {
                    reason: reason.into(),
                }),
            };
        }
        Ok(None)
    }
}
