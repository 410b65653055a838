//! A slot that a run of this shim tries to get.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use polydev_proto::node::{Slot, slot::State};
use tonic::transport::Channel;

use super::{Clock, View};

/// An idle slot, taken out of the view while it is tried.
#[derive(Debug)]
pub struct Candidate {
    pub node_id: String,
    pub channel: Channel,
    pub start_id: String,
    /// When its driver's journal was begun.
    pub since: SystemTime,
    pub slot_id: String,
    pub provider: String,
    pub generation: u64,
    /// Of its container: what secrets are sealed to.
    pub public_key: Bytes,
    /// It was made for one run.
    pub on_demand: bool,
    pub(super) clock: Clock,
    pub(super) view: View,
}

impl Candidate {
    /// The moment `after` from now, in the driver's clock.
    #[must_use]
    pub fn driver_time(&self, after: Duration) -> SystemTime {
        self.clock.told + self.clock.heard.elapsed() + after
    }

    /// The driver has granted it: the view need not wait to be told.
    pub fn granted(&self) {
        self.told(|slot| slot.set_state(State::Claimed));
    }

    /// The driver has leased it.
    pub fn leased(&self, run_id: &str) {
        self.told(|slot| {
            slot.set_state(State::Leased);
            run_id.clone_into(&mut slot.run_id);
        });
    }

    fn told(&self, change: impl FnOnce(&mut Slot)) {
        self.view.update(|inner| {
            let Some((node, ready)) = inner.connected(&self.node_id) else {
                return;
            };
            let is_free = !node
                .claiming
                .contains(&(self.slot_id.clone(), self.generation));
            let slot = node.slots.get_mut(&self.slot_id);
            if let Some(slot) = slot.filter(|slot| slot.generation == self.generation) {
                ready.remove(&self.node_id, slot);
                change(slot);
                // The driver has been away meanwhile, and told of it anew.
                if is_free {
                    ready.insert(&self.node_id, slot);
                }
            }
        });
    }
}

impl Drop for Candidate {
    fn drop(&mut self) {
        let slot_id = std::mem::take(&mut self.slot_id);
        let claimed = (slot_id, self.generation);
        self.view.update(|inner| {
            let Some((node, ready)) = inner.connected(&self.node_id) else {
                return;
            };
            if !node.claiming.remove(&claimed) {
                return;
            }
            let slot = node.slots.get(&claimed.0);
            if let Some(slot) = slot.filter(|slot| slot.generation == self.generation) {
                ready.insert(&self.node_id, slot);
            }
        });
    }
}
