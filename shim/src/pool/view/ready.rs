//! Which slots can be claimed right now: found without a look at the others, of which there
//! may be tens of thousands.

use std::collections::{BTreeSet, HashMap, HashSet};

use indexmap::IndexSet;
use polydev_proto::node::{Slot, slot::State};
use rand::Rng;

/// Slots that are looked at for one on a node that may have room: nobody else sees the view
/// meanwhile.
const LOOK: usize = 64;

/// One slot of one node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) node_id: String,
    pub(super) slot_id: String,
}

/// Slots that are ready and that no run of this shim is claiming.
#[derive(Debug, Default)]
pub(super) struct Ready {
    /// Idle slots of pools, by provider.
    pools: HashMap<String, IndexSet<Key>>,
    /// Slots that are for one run, made on demand or leased, by the run's id.
    runs: HashMap<String, Key>,
    /// Nodes that the cluster has lost: their pools' slots are not for new runs.
    lost: HashSet<String>,
}

/// Whose a ready slot is.
enum For<'a> {
    Pool(&'a str),
    Run(&'a str),
}

fn ready_for(slot: &Slot) -> Option<For<'_>> {
    match slot.state() {
        State::Idle if slot.for_run_id.is_empty() => Some(For::Pool(&slot.provider)),
        State::Idle => Some(For::Run(&slot.for_run_id)),
        State::Leased => Some(For::Run(&slot.run_id)),
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
            slot_id: slot.slot_id.clone(),
        };
        match ready_for(slot) {
            Some(For::Pool(_)) if self.lost.contains(node_id) => {}
            Some(For::Pool(provider)) => match self.pools.get_mut(provider) {
                Some(pool) => drop(pool.insert(key())),
                None => drop(self.pools.insert(provider.to_owned(), [key()].into())),
            },
            Some(For::Run(run_id)) => drop(self.runs.insert(run_id.to_owned(), key())),
            None => {}
        }
    }

    /// Whether slots of a pool on that node may come in. Those that are in stay so.
    pub(super) fn set_lost(&mut self, node_id: &str, lost: bool) {
        if lost {
            self.lost.insert(node_id.to_owned());
        } else {
            self.lost.remove(node_id);
        }
    }

    /// Takes a slot out, as it was when it came in.
    pub(super) fn remove(&mut self, node_id: &str, slot: &Slot) {
        let is_it = |key: &Key| (&*key.node_id, &*key.slot_id) == (node_id, &*slot.slot_id);
        match ready_for(slot) {
            Some(For::Pool(provider)) => {
                let key = Key {
                    node_id: node_id.to_owned(),
                    slot_id: slot.slot_id.clone(),
                };
                if let Some(pool) = self.pools.get_mut(provider) {
                    pool.swap_remove(&key);
                }
            }
            Some(For::Run(run_id)) if self.runs.get(run_id).is_some_and(is_it) => {
                self.runs.remove(run_id);
            }
            Some(For::Run(_)) | None => {}
        }
    }

    /// A random one of a pool.
    pub(super) fn of_pool(&self, provider: &str) -> Option<&Key> {
        self.beyond(provider, &BTreeSet::new())
    }

    /// One of a pool, of a node that is not `full`, if it is among [`LOOK`] from a random one on.
    pub(super) fn beyond(&self, provider: &str, full: &BTreeSet<String>) -> Option<&Key> {
        let pool = self.pools.get(provider).filter(|pool| !pool.is_empty())?;
        let first = rand::rng().random_range(0..pool.len());
        let at = |further: usize| pool.get_index((first + further) % pool.len());
        let mut keys = (0..pool.len().min(LOOK)).filter_map(at);
        keys.find(|key| !full.contains(&key.node_id))
    }

    pub(super) fn of_run(&self, run_id: &str) -> Option<&Key> {
        self.runs.get(run_id)
    }

    /// All of a pool, in their order.
    #[cfg(test)]
    pub(super) fn pool(&self, provider: &str) -> Vec<String> {
        let pool = self.pools.get(provider).into_iter().flatten();
        let mut slots: Vec<_> = pool.map(|key| key.slot_id.clone()).collect();
        slots.sort();
        slots
    }
}
