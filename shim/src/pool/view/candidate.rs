//! A slot that a run of this shim tries to get.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use polydev_proto::{
    broker::Egress,
    id::{Generation, RunId, SlotId, UserId},
    node::{Slot, slot::State},
};
use tonic::transport::Channel;

use super::{Clock, View};

/// Since this version of the protocol between driver and broker, both know what roles say, and
/// drivers report what slots may reach.
pub const POLICY_VERSION: u32 = 4;

/// A slot that no other run of this shim is offered while the run tries it.
#[derive(Debug)]
pub struct Candidate {
    pub node_id: String,
    pub channel: Channel,
    pub start_id: String,
    /// The driver's `node_identity`.
    pub identity: String,
    /// Image reference of the slot's containers.
    pub image: String,
    /// When the driver's journal was begun.
    pub since: SystemTime,
    pub slot_id: SlotId,
    pub provider: String,
    pub generation: Generation,
    /// The public key of the slot's container, for sealing secrets.
    pub public_key: Bytes,
    /// The key to seal keys for the node's broker with. Empty while there is no broker.
    pub broker_key: Bytes,
    /// Version of the protocol between the node's driver and its broker.
    pub broker_version: u32,
    /// What its container may reach; `None` with a network interface.
    pub egress: Option<Egress>,
    /// Whether the slot was made for one run.
    pub on_demand: bool,
    pub(super) clock: Clock,
    pub(super) view: View,
}

impl Candidate {
    /// The moment `after` from now, by the driver's clock.
    #[must_use]
    pub fn driver_time(&self, after: Duration) -> SystemTime {
        self.clock.told + self.clock.heard.elapsed() + after
    }

    /// Whether it reaches more than each slot of its pool that is known. Its job has a list of its
    /// own, and the default of that is the internet.
    #[must_use]
    pub fn exceeds_pool(&self) -> bool {
        let covers = |pool: &Slot| match (&pool.egress, &self.egress) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(pool), Some(own)) => own.allow.iter().all(|rule| pool.allow.contains(rule)),
        };
        let inner = self.view.lock();
        let connected = inner
            .nodes
            .values()
            .filter_map(|node| node.connected.as_ref());
        let slots = connected.flat_map(|node| node.slots.values());
        // An earlier driver does not say what its slots reach.
        let of_pool = |slot: &&Slot| {
            let is_known = slot.broker_version >= POLICY_VERSION;
            is_known && slot.provider == self.provider && slot.for_run_id.is_empty()
        };
        let mut pool = slots.filter(of_pool).peekable();
        pool.peek().is_some() && !pool.any(covers)
    }

    /// Marks the slot as claimed in the view, before the driver reports it.
    pub fn granted(&self, user_id: &UserId, run_id: RunId) {
        self.is(State::Claimed, user_id, run_id);
    }

    /// Marks the slot as leased in the view.
    pub fn leased(&self, user_id: &UserId, run_id: RunId) {
        self.is(State::Leased, user_id, run_id);
    }

    fn is(&self, state: State, user_id: &UserId, run_id: RunId) {
        self.told(|slot| {
            slot.set_state(state);
            slot.user_id = user_id.clone().into();
            slot.run_id = run_id.into();
        });
    }

    fn told(&self, change: impl FnOnce(&mut Slot)) {
        self.view.update(|inner| {
            let Some((node, ready, held)) = inner.connected(&self.node_id) else {
                return;
            };
            let is_free = !node
                .claiming
                .contains(&(self.slot_id.clone(), self.generation));
            let slot = node.slots.get_mut(&self.slot_id);
            if let Some(slot) = slot.filter(|slot| slot.generation == self.generation.0) {
                ready.remove(&self.node_id, slot);
                change(slot);
                held.put(&self.node_id, slot);
                // The driver was away meanwhile, and has reported the slot again.
                if is_free {
                    ready.insert(&self.node_id, slot);
                }
            }
        });
    }
}

impl Drop for Candidate {
    fn drop(&mut self) {
        let claimed = (self.slot_id.clone(), self.generation);
        self.view.update(|inner| {
            let Some((node, ready, _)) = inner.connected(&self.node_id) else {
                return;
            };
            if !node.claiming.remove(&claimed) {
                return;
            }
            let slot = node.slots.get(&claimed.0);
            if let Some(slot) = slot.filter(|slot| slot.generation == self.generation.0) {
                ready.insert(&self.node_id, slot);
            }
        });
    }
}
