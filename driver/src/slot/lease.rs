//! A lease: one idle container, with its part of the node's headroom, kept for one run that
//! has an id and no command yet. It ends with that run's claim, with its time, or when it is
//! given back; but for a claim the container is destroyed, used or not.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{sync::watch, time::sleep_until};

use super::{
    Slot,
    headroom::{Amount, Share},
    state::{Event, State},
};
use crate::{
    node::Node,
    run::{book::NotFound, claim::Refusal},
};

/// What goes with the state of a leased slot.
#[derive(Debug)]
pub(super) struct Lease {
    share: Option<Share>,
    /// When it ends.
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

impl Slot {
    /// Keeps the idle container for a run; until when. As often as it is asked for, it is one.
    ///
    /// # Errors
    /// [`Refusal`]: nothing has changed.
    pub(crate) fn lease(
        &self,
        node: &Node,
        generation: u64,
        run_id: &str,
        user_id: &str,
        time: Duration,
    ) -> Result<SystemTime, Refusal> {
        let now = SystemTime::now();
        let life = self.lock();
        if let State::Leased { holder, until } = life.state()
            && (life.generation(), &*holder.run_id, &*holder.user_id)
                == (generation, run_id, user_id)
        {
            return Ok(*until);
        }
        let until = now + time;
        let mut next = life.clone();
        let leased = Event::Leased {
            generation,
            run_id: run_id.to_owned(),
            user_id: user_id.to_owned(),
            until,
        };
        next.apply(leased, now).map_err(Refusal::Taken)?;
        let share = Amount::on_top(&node.config.run, &self.idle);
        let share = node.headroom.take(share)?;
        // The next life of the driver is not to take it for an idle one: its key has been told.
        node.idle.forget(&self.identity.slot_id());
        let mut lease = self.lease_lock();
        lease.share = Some(share);
        lease.until.send_replace(Some(Instant::now() + time));
        drop(lease);
        self.step(life, next);
        Ok(until)
    }

    /// Ends a lease.
    ///
    /// # Errors
    /// [`NotFound`] if it is not this slot's, or another user's.
    pub(crate) fn release(&self, run_id: &str, user_id: &str) -> Result<(), NotFound> {
        let life = self.lock();
        let run_id = run_id.to_owned();
        match life.state() {
            State::Leased { holder, .. } if holder.run_id == run_id => {
                if holder.user_id != user_id {
                    return Err(NotFound::Forbidden { run_id });
                }
                self.lease_lock().until.send_replace(Some(Instant::now()));
                Ok(())
            }
            _ => Err(NotFound::Unknown { run_id }),
        }
    }

    /// Whether it has of the node already what its run needs.
    pub(super) fn has_leased_share(&self) -> bool {
        self.lease_lock().share.is_some()
    }

    /// That, which goes from the lease to its run; or nowhere, if none comes.
    pub(super) fn leased_share(&self) -> Option<Share> {
        let mut lease = self.lease_lock();
        lease.until.send_replace(None);
        lease.share.take()
    }

    /// Waits until the lease has ended without a claim, of which there will be none then.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub(super) async fn lease_ends(self: &Arc<Self>) {
        let mut changes = self.lease_lock().until.subscribe();
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
                    // A claim of this moment has made it something else.
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
