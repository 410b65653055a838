//! `prepare_ahead`: the container of a slot's next generation, made while a run goes on in
//! this one.

use std::{sync::Arc, time::Duration};

use tokio::{task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    Slot, Slots, clear,
    fill::{self, Container},
};
use crate::headroom::{Amount, Share};

/// A run that is over by then is not worth dockerd's time: neither a container prepared
/// beside it nor limits that `docker inspect` would show.
pub(super) const LONG_RUN: Duration = Duration::from_millis(200);

/// A container on its way.
#[derive(Debug)]
pub(super) struct Ahead {
    made: JoinHandle<Option<Container>>,
    wanted: CancellationToken,
}

impl Ahead {
    /// Begins to make one, if the slot is to have one and the node has room for both.
    pub(super) fn begin(slots: &Arc<Slots>, slot: &Arc<Slot>) -> Option<Self> {
        if !slot.config.prepare_ahead {
            return None;
        }
        let room = match slots.headroom.take(Amount::from(&slot.idle)) {
            Ok(room) => room,
            Err(full) => {
                tracing::debug!(slot = slot.identity.slot_id(), %full, "nothing is prepared");
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

    /// The container, once the one before it has ended and given its room back. `None` if it
    /// came to nothing, or the slot is not wanted any more.
    pub(super) async fn take(self) -> Option<Container> {
        self.wanted.cancel();
        // That it panicked has been reported.
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
    let (slot_id, generation) = (slot.identity.slot_id(), slot.life().generation() + 1);
    match fill::fill(&slots, &slot, generation).await {
        Ok(mut container) => {
            tracing::debug!(slot = slot_id, generation, "the next container is prepared");
            tokio::select! {
                biased;
                () = wanted.cancelled() => return Some(container),
                reason = container.dies() => {
                    tracing::warn!(slot = slot_id, generation, reason, "a prepared container died");
                }
                () = slot.drain.cancelled() => {}
            }
        }
        Err(fill::Error::Stopped) => {}
        Err(error) => {
            let error = crate::chain(&error);
            tracing::warn!(
                slot = slot_id,
                generation,
                error,
                "the next container is not prepared"
            );
        }
    }
    let _or_the_reaper = clear::clean(&slots, &slot, Some(generation)).await;
    None
}
