//! Leases: slots that are kept for one run to come.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use polydev_proto::node::{LeaseRequest, ReleaseRequest, Slot, slot::State};
use prost_types::Timestamp;
use tokio::time::sleep;
use tonic::Status;

use super::{Inner, Slots, not_idle};
use crate::fake_node::lock;

impl Slots {
    /// # Errors
    /// FAILED_PRECONDITION if the slot is not idle at that generation.
    pub(in crate::fake_node) fn lease(
        self: &Arc<Self>,
        request: &LeaseRequest,
    ) -> Result<Timestamp, Status> {
        let LeaseRequest {
            run_id,
            slot_id,
            generation,
            user_id,
            time,
            ..
        } = request;
        let time = time.and_then(|time| Duration::try_from(time).ok());
        let time = time.ok_or_else(|| Status::invalid_argument("`time` is missing"))?;
        let mut inner = lock(&self.inner);
        let Inner {
            all,
            holders,
            watchers,
            ..
        } = &mut *inner;
        let slot = all.iter_mut().find(|slot| {
            let is_free = slot.state() == State::Idle && slot.for_run_id.is_empty();
            is_free && slot.slot_id == *slot_id && slot.generation == *generation
        });
        let slot = slot.ok_or_else(not_idle)?;
        slot.set_state(State::Leased);
        slot.run_id.clone_from(run_id);
        slot.user_id.clone_from(user_id);
        holders.insert(run_id.clone(), user_id.clone());
        self.report(watchers, std::slice::from_ref(&*slot), &[]);
        let (slots, run_id) = (self.clone(), run_id.clone());
        tokio::spawn(async move {
            sleep(time).await;
            slots.end_lease(&run_id);
        });
        Ok(Timestamp::from(SystemTime::now() + time))
    }

    /// # Errors
    /// NOT_FOUND if there is no such lease, and PERMISSION_DENIED if it is another user's.
    pub(in crate::fake_node) fn release(
        self: &Arc<Self>,
        request: &ReleaseRequest,
    ) -> Result<(), Status> {
        let ReleaseRequest { run_id, user_id } = request;
        let holder = lock(&self.inner).holders.get(run_id).cloned();
        if holder.as_ref().is_some_and(|holder| holder != user_id) {
            return Err(Status::permission_denied("the lease is another user's"));
        }
        match self.end_lease(run_id) {
            true => Ok(()),
            false => Err(Status::not_found("there is no such lease")),
        }
    }

    /// Ends the lease of a run. Returns whether there was an unused one.
    fn end_lease(self: &Arc<Self>, run_id: &str) -> bool {
        let inner = lock(&self.inner);
        let is_leased = |slot: &&Slot| slot.state() == State::Leased && slot.run_id == run_id;
        let leased = inner.all.iter().find(is_leased);
        let Some(slot_id) = leased.map(|slot| slot.slot_id.clone()) else {
            return false;
        };
        drop(inner);
        self.change(&slot_id, |slot| {
            slot.set_state(State::Recycling);
            slot.run_id.clear();
            slot.user_id.clear();
        });
        self.refill(slot_id);
        true
    }
}
