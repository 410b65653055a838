//! `prepare_ahead`: makes the container of a slot's next generation while a run continues
//! in the current one.

use std::{sync::Arc, time::Duration};

use tokio::{task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    Slot, Slots, clear,
    fill::{self, Container},
};
use crate::headroom::{Amount, Share};

/// Runs that are over by then are not worth dockerd's time: neither for a prepared
/// container, nor for updating the limits that `docker inspect` shows.
pub(super) const LONG_RUN: Duration = Duration::from_millis(200);

/// A container that is being made.
#[derive(Debug)]
pub(super) struct Ahead {
    made: JoinHandle<Option<Container>>,
    wanted: CancellationToken,
}

impl Ahead {
    /// Starts to make a container, if the slot wants one and the node has room for both.
    pub(super) fn begin(slots: &Arc<Slots>, slot: &Arc<Slot>) -> Option<Self> {
        if !slot.config.prepare_ahead {
            return None;
        }
        let room = match slots.headroom.take(Amount::from(&slot.idle)) {
            Ok(room) => room,
            Err(full) => {
                tracing::debug!(slot = %slot.identity.slot_id(), %full, "no container is prepared");
                return None;
            }
        };
        let wanted = CancellationToken::new();
        let making = make(slots.clone(), slot.clone(), room, wanted.clone());
        Some(Self {
            made: slots.site.background.spawn(making),
            wanted,
        })
    }

    /// The container, once the previous one has ended and freed its room. `None` if making
    /// it failed, or the slot is no longer wanted.
    pub(super) async fn take(self) -> Option<Container> {
        self.wanted.cancel();
        // A panic has already been reported.
        self.made.await.ok().flatten()
    }
}

async fn make(
    slots: Arc<Slots>,
    slot: Arc<Slot>,
    _room: Share,
    wanted: CancellationToken,
) -> Option<Container> {
    tokio::select! {
        () = sleep(LONG_RUN) => {}
        () = wanted.cancelled() => return None,
    }
    let (slot_id, generation) = (slot.identity.slot_id(), slot.life().generation().next());
    match fill::fill(&slots, &slot, generation).await {
        Ok(mut container) => {
            tracing::debug!(slot = %slot_id, %generation, "the next container is ready");
            tokio::select! {
                biased;
                () = wanted.cancelled() => return Some(container),
                reason = container.dies() => {
                    tracing::warn!(slot = %slot_id, %generation, reason, "a prepared container died");
                }
                () = slot.drain.cancelled() => {}
            }
        }
        Err(fill::Error::Stopped) => {}
        Err(error) => {
            let error = crate::chain(&error);
            tracing::warn!(
                slot = %slot_id,
                %generation,
                error,
                "cannot prepare the next container"
            );
        }
    }
    let _or_the_reaper = clear::clean(&slots, &slot, Some(generation)).await;
    None
}
