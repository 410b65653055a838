//! A lease: one idle container, with its share of the node's headroom, reserved for one run
//! that has an id but no command yet. It ends with the run's claim, at its time limit, or
//! when it is released. Unless the run claims it, the container is destroyed.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use polydev_proto::id::{Generation, RunId, SlotId, UserId};
use tokio::{sync::watch, time::sleep_until};

use super::{Slot, Slots};
use crate::{
    headroom::{Amount, Share},
    life::{Event, State},
    run::{book::NotFound, claim::Refusal},
};

/// The details of a leased slot.
#[derive(Debug)]
pub(super) struct Lease {
    share: Option<Share>,
    /// When the lease ends.
    until: watch::Sender<Option<Instant>>,
}

impl Default for Lease {
    fn default() -> Self {
        Self {
            share: None,
            until: watch::Sender::new(None),
        }
    }
}

/// A shim's lease request.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) slot_id: SlotId,
    pub(crate) generation: Generation,
    /// The start of the driver that the shim saw.
    pub(crate) start_id: String,
    pub(crate) run_id: RunId,
    pub(crate) user_id: UserId,
    pub(crate) time: Duration,
}

impl Slots {
    /// Reserves a slot's idle container for one run; returns the end of the lease.
    ///
    /// # Errors
    /// [`Refusal`]; nothing has changed.
    pub(crate) fn lease(&self, wanted: &Wanted) -> Result<SystemTime, Refusal> {
        self.check_start(&wanted.start_id)?;
        self.live(&wanted.slot_id)?.lease(self, wanted)
    }

    /// Ends the lease of a run, in whichever slot.
    ///
    /// # Errors
    /// [`NotFound`] if there is no lease, or it belongs to another user.
    pub(crate) fn release(&self, run_id: RunId, user_id: &UserId) -> Result<(), NotFound> {
        for slot in self.book.all() {
            match slot.release(run_id, user_id) {
                Err(NotFound::Unknown { .. }) => {}
                released => return released,
            }
        }
        Err(NotFound::Unknown { run_id })
    }
}

impl Slot {
    /// Reserves the idle container for a run; returns the end of the lease. Repeated
    /// requests share one lease.
    ///
    /// # Errors
    /// [`Refusal`]; nothing has changed.
    fn lease(&self, slots: &Slots, wanted: &Wanted) -> Result<SystemTime, Refusal> {
        let Wanted {
            generation,
            run_id,
            user_id,
            time,
            ..
        } = wanted;
        let now = SystemTime::now();
        let life = self.lock();
        if let State::Leased { holder, until } = life.state()
            && (life.generation(), holder.run_id, &holder.user_id)
                == (*generation, *run_id, user_id)
        {
            return Ok(*until);
        }
        if let Some(reason) = self.unguarded(&slots.site) {
            return Err(Refusal::Unguarded { reason });
        }
        let until = now + *time;
        let mut next = life.clone();
        let leased = Event::Leased {
            generation: *generation,
            run_id: *run_id,
            user_id: user_id.clone(),
            until,
        };
        next.apply(leased, now).map_err(Refusal::Taken)?;
        let share = Amount::on_top(&slots.site.config.class(self.config.provider), &self.idle);
        let share = slots.headroom.take(share)?;
        // The next life of the driver must not treat it as idle, because its key has been sent.
        slots.idle.forget(&self.identity.slot_id());
        let mut lease = self.lease.lock();
        lease.share = Some(share);
        lease.until.send_replace(Some(Instant::now() + *time));
        drop(lease);
        self.step(life, next);
        Ok(until)
    }

    /// Ends a lease.
    ///
    /// # Errors
    /// [`NotFound`] if this slot does not have the lease, or it belongs to another user.
    fn release(&self, run_id: RunId, user_id: &UserId) -> Result<(), NotFound> {
        let life = self.lock();
        match life.state() {
            State::Leased { holder, .. } if holder.run_id == run_id => {
                if holder.user_id != *user_id {
                    return Err(NotFound::Forbidden { run_id });
                }
                self.lease.lock().until.send_replace(Some(Instant::now()));
                Ok(())
            }
            _ => Err(NotFound::Unknown { run_id }),
        }
    }

    /// Whether the lease already holds the share that the run needs.
    pub(super) fn has_leased_share(&self) -> bool {
        self.lease.lock().share.is_some()
    }

    /// Takes the share out of the lease, for its run or to be dropped.
    pub(super) fn leased_share(&self) -> Option<Share> {
        let mut lease = self.lease.lock();
        lease.until.send_replace(None);
        lease.share.take()
    }

    /// Waits until the lease has ended without a claim; a later claim is then impossible.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub(super) async fn lease_ends(self: &Arc<Self>) {
        let mut changes = self.lease.lock().until.subscribe();
        loop {
            let until = *changes.borrow_and_update();
            let passed = async {
                match until {
                    Some(until) => sleep_until(until.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = passed => {
                    // Fails if a claim has just changed the state.
                    let has_ended = self.try_apply(Event::LeaseEnded).is_ok();
                    drop(self.leased_share());
                    if has_ended {
                        return;
                    }
                }
                changed = changes.changed() => {
                    if changed.is_err() {
                        unreachable!("the sender is in `self`");
                    }
                }
            }
        }
    }
}
