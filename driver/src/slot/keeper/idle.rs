//! A slot whose container waits.

use super::{Container, Keeper};
use crate::{
    firewall::Guard,
    life::Event,
    slot::{Claim, agent, expected},
};

impl Keeper {
    /// Waits until the container may run something. Returns false if the slot is no longer wanted.
    pub(super) async fn guarded(&self) -> bool {
        if let Some(reason) = self.slot.unguarded(&self.slots.site) {
            self.slot.apply(Event::Held { reason });
        }
        tokio::select! {
            () = self.slot.guarded(&self.slots.site) => true,
            () = self.slot.drain.cancelled() => false,
        }
    }

    /// Waits until the container is claimed or no longer needed. If the container died,
    /// returns the reason.
    pub(super) async fn idle(
        &mut self,
        container: &mut Container,
    ) -> (Option<Claim>, Option<String>) {
        let not_needed = expected::not_needed(&self.slots, &self.slot);
        let renewed = agent::renewed(&self.slot, container.ready);
        let mut guard = self.slots.site.guard.subscribe();
        // It may have closed just now.
        guard.mark_changed();
        tokio::pin!(not_needed, renewed);
        let died = loop {
            tokio::select! {
                biased;
                Some(claim) = self.granted.recv() => return (Some(claim), None),
                () = self.slot.lease_ends() => return (None, None),
                () = &mut renewed => return (None, None),
                Ok(()) = guard.changed(), if self.slot.has_network() => {
                    // A claim that was granted before is served.
                    self.slot.apply(match &*guard.borrow_and_update() {
                        Guard::Open => Event::Warmed,
                        Guard::Closed { reason } => Event::Held { reason: reason.clone() },
                    });
                }
                reason = container.dies() => break format!("its idle container died: {reason}"),
                () = self.slot.drain.cancelled() => {
                    // A claim that was granted just before the drain is still served.
                    if !self.slot.is_claimed() {
                        return (None, None);
                    }
                }
                reason = &mut not_needed, if !self.slot.drain.is_cancelled() => {
                    self.slots.site.events.send(&self.slot.identity, reason);
                    self.slot.drain();
                }
            }
        };
        self.slot.apply(Event::Died {
            reason: died.clone(),
        });
        // A claim that was granted in the meantime is on its way here, or has arrived.
        let claim = match self.slot.is_claimed() {
            true => self.granted.recv().await,
            false => None,
        };
        (claim, Some(died))
    }
}
