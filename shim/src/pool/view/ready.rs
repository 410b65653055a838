//! The slots that can be claimed right now. They are found without a search of all slots, of
//! which there may be tens of thousands.

use std::collections::{BTreeSet, HashMap, HashSet};

use indexmap::IndexSet;
use polydev_proto::{
    id::{RunId, SlotId},
    node::{Slot, slot::State},
};
use rand::Rng;

/// Largest number of slots that are searched for one on a node that may have room. It is small
/// because the view is locked meanwhile.
const MAX_LOOKED_AT: usize = 64;

/// One slot of one node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) node_id: String,
    pub(super) slot_id: SlotId,
}

/// Slots that are ready and that no run of this shim is claiming.
#[derive(Debug, Default)]
pub(super) struct Ready {
    /// Idle slots of pools, by provider.
    pools: HashMap<String, IndexSet<Key>>,
    /// Slots for one run, which were made on demand or leased, by the run's id.
    runs: HashMap<RunId, Key>,
    /// Nodes that the cluster has lost. Their pool slots get no new runs.
    lost: HashSet<String>,
}

/// The runs that a ready slot is for.
enum For<'a> {
    Pool(&'a str),
    Run(RunId),
}

fn ready_for(slot: &Slot) -> Option<For<'_>> {
    match slot.state() {
        State::Idle if slot.for_run_id.is_empty() => Some(For::Pool(&slot.provider)),
        State::Idle => slot.for_run_id.parse().ok().map(For::Run),
        State::Leased => slot.run_id.parse().ok().map(For::Run),
        _ => None,
    }
}

/// Whether a slot is ready for any run of its pool.
pub(super) fn is_pools(slot: &Slot) -> bool {
    matches!(ready_for(slot), Some(For::Pool(_)))
}

impl Ready {
    pub(super) fn insert(&mut self, node_id: &str, slot: &Slot) {
        let key = || Key {
            node_id: node_id.to_owned(),
            slot_id: slot.slot_id.as_str().into(),
        };
        match ready_for(slot) {
            Some(For::Pool(_)) if self.lost.contains(node_id) => {}
            Some(For::Pool(provider)) => match self.pools.get_mut(provider) {
                Some(pool) => drop(pool.insert(key())),
                None => drop(self.pools.insert(provider.to_owned(), [key()].into())),
            },
            Some(For::Run(run_id)) => drop(self.runs.insert(run_id, key())),
            None => {}
        }
    }

    /// Sets whether pool slots of the node are rejected. Slots that are ready stay ready.
    pub(super) fn set_lost(&mut self, node_id: &str, lost: bool) {
        if lost {
            self.lost.insert(node_id.to_owned());
        } else {
            self.lost.remove(node_id);
        }
    }

    /// Removes a slot. It must be in the state in which it was inserted.
    pub(super) fn remove(&mut self, node_id: &str, slot: &Slot) {
        let is_it = |key: &Key| (&*key.node_id, key.slot_id.as_str()) == (node_id, &*slot.slot_id);
        match ready_for(slot) {
            Some(For::Pool(provider)) => {
                let key = Key {
                    node_id: node_id.to_owned(),
                    slot_id: slot.slot_id.as_str().into(),
                };
                if let Some(pool) = self.pools.get_mut(provider) {
                    pool.swap_remove(&key);
                }
            }
            Some(For::Run(run_id)) if self.runs.get(&run_id).is_some_and(is_it) => {
                self.runs.remove(&run_id);
            }
            Some(For::Run(_)) | None => {}
        }
    }

    /// A random slot of a pool.
    pub(super) fn of_pool(&self, provider: &str) -> Option<&Key> {
        self.beyond(provider, &BTreeSet::new())
    }

    /// A slot of a pool on a node that is not in `full`. Searches [`MAX_LOOKED_AT`] slots from a random one.
    pub(super) fn beyond(&self, provider: &str, full: &BTreeSet<String>) -> Option<&Key> {
        let pool = self.pools.get(provider).filter(|pool| !pool.is_empty())?;
        let first = rand::rng().random_range(0..pool.len());
        let at = |further: usize| pool.get_index((first + further) % pool.len());
        let mut keys = (0..pool.len().min(MAX_LOOKED_AT)).filter_map(at);
        keys.find(|key| !full.contains(&key.node_id))
    }

    pub(super) fn of_run(&self, run_id: RunId) -> Option<&Key> {
        self.runs.get(&run_id)
    }

    /// All slots of a pool, in order.
    #[cfg(test)]
    pub(super) fn pool(&self, provider: &str) -> Vec<String> {
        let pool = self.pools.get(provider).into_iter().flatten();
        let mut slots: Vec<_> = pool.map(|key| key.slot_id.clone().into()).collect();
        slots.sort();
        slots
    }
}
