//! The live view: slots by node, and a way to wait for an idle one. The view may be out of date:
//! a driver decides about its slots.

mod candidate;
mod held;
mod ready;
mod used;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::{Mutex, MutexGuard};
use polydev_proto::{
    id::{Generation, RunId, SlotId},
    node::{Slot, WatchSlotsResponse, slot::State},
};
use tokio::sync::watch;
use tonic::transport::Channel;

pub use candidate::{Candidate, POLICY_VERSION};
use held::Held;
use ready::{Key, Ready};
use used::OnNodes;

/// The slots that drivers have reported; clones share them.
#[derive(Debug, Clone)]
pub struct View {
    inner: Arc<Mutex<Inner>>,
    changed: Arc<watch::Sender<u64>>,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: HashMap<String, Node>,
    /// The slots of connected nodes that may be taken.
    ready: Ready,
    held: Held,
    used: OnNodes,
}

/// A node that is or was connected.
#[derive(Debug, Default)]
struct Node {
    /// `None` while the node cannot be reached. Its slots cannot be claimed then.
    connected: Option<Connected>,
    /// Since when the node is no longer part of the cluster. It may still have runs for a while.
    left: Option<Instant>,
}

/// How long a node that has left is remembered: as long as a driver remembers its runs.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(70 * 60);

#[derive(Debug)]
struct Connected {
    channel: Channel,
    start_id: String,
    /// The driver's `node_identity`.
    identity: String,
    /// When the driver's journal was begun.
    since: SystemTime,
    clock: Clock,
    slots: HashMap<SlotId, Slot>,
    /// Slots, with generation, that a run of this shim is claiming right now.
    claiming: HashSet<(SlotId, Generation)>,
}

/// The time that the driver last reported, and when it did by this machine's clock.
#[derive(Debug, Clone, Copy)]
struct Clock {
    told: SystemTime,
    heard: Instant,
}

/// A slot that is leased for a later run.
#[derive(Debug)]
pub struct Kept {
    pub node_id: String,
    pub channel: Channel,
    pub provider: String,
}

/// The slots of one provider by state.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub warming: u32,
    pub idle: u32,
    pub leased: u32,
    pub claimed: u32,
    pub recycling: u32,
    pub draining: u32,
    pub failed: u32,
    /// Slots that were made for one run each, in any state. The other counts do not include them.
    pub on_demand: u32,
}

impl Counts {
    /// All slots of the pool.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.warming
            + self.idle
            + self.leased
            + self.claimed
            + self.recycling
            + self.draining
            + self.failed
    }
}

impl View {
    #[must_use]
    pub fn new() -> Self {
        Self {
            inner: Arc::default(),
            changed: Arc::new(watch::Sender::new(0)),
        }
    }

    /// A random idle slot of `provider`, as soon as there is one. The slot is not
    /// offered to another run of this shim until the candidate is dropped.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn idle_slot(&self, provider: &str) -> Candidate {
        self.wait_for(|view| view.take(|ready| ready.of_pool(provider)))
            .await
    }

    /// As [`View::idle_slot`], on a node that is not in `full`; `None` if a short search finds
    /// none.
    #[must_use]
    pub fn idle_beyond(&self, provider: &str, full: &BTreeSet<String>) -> Option<Candidate> {
        self.take(|ready| ready.beyond(provider, full))
    }

    /// The slot that was made on demand for a run, or is leased for it, as soon as it is ready.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn slot_for(&self, run_id: RunId) -> Candidate {
        self.wait_for(|view| view.take(|ready| ready.of_run(run_id)))
            .await
    }

    async fn wait_for<T>(&self, look: impl Fn(&Self) -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        loop {
            changed.mark_unchanged();
            if let Some(found) = look(self) {
                return found;
            }
            if changed.changed().await.is_err() {
                unreachable!("the sender is in `self`");
            }
        }
    }

    /// Takes the `chosen` slot, if there is one, out of the ready slots.
    fn take(&self, chosen: impl FnOnce(&Ready) -> Option<&Key>) -> Option<Candidate> {
        let mut inner = self.lock();
        let Inner { nodes, ready, .. } = &mut *inner;
        let key = chosen(ready)?.clone();
        let node = nodes.get_mut(&key.node_id)?.connected.as_mut()?;
        let slot = node.slots.get(&key.slot_id)?;
        ready.remove(&key.node_id, slot);
        let generation = Generation(slot.generation);
        node.claiming.insert((key.slot_id.clone(), generation));
        Some(Candidate {
            channel: node.channel.clone(),
            start_id: node.start_id.clone(),
            identity: node.identity.clone(),
            image: slot.image.clone(),
            since: node.since,
            provider: slot.provider.clone(),
            generation,
            public_key: slot.public_key.clone(),
            broker_key: slot.broker_key.clone(),
            broker_version: slot.broker_version,
            egress: slot.egress.clone(),
            on_demand: !slot.for_run_id.is_empty(),
            clock: node.clock,
            view: self.clone(),
            node_id: key.node_id,
            slot_id: key.slot_id,
        })
    }

    /// Slots by provider and state.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<String, Counts> {
        let mut pools: BTreeMap<String, Counts> = BTreeMap::new();
        for slot in self
            .lock()
            .nodes
            .values()
            .flat_map(|node| &node.connected)
            .flat_map(|n| n.slots.values())
        {
            let pool = pools.entry(slot.provider.clone()).or_default();
            if !slot.for_run_id.is_empty() {
                pool.on_demand += 1;
                continue;
            }
            match slot.state() {
                State::Warming => pool.warming += 1,
                State::Idle => pool.idle += 1,
                State::Leased => pool.leased += 1,
                State::Claimed => pool.claimed += 1,
                State::Recycling => pool.recycling += 1,
                State::Draining => pool.draining += 1,
                State::Failed => pool.failed += 1,
                // A state that only newer drivers know is not counted.
                State::Unspecified => {}
            }
        }
        pools
    }

    /// A provider's slots with the ids of their nodes, in order.
    #[must_use]
    pub fn slots(&self, provider: &str) -> Vec<(String, Slot)> {
        let nodes = &self.lock().nodes;
        let slots = nodes.iter().flat_map(|(node_id, node)| {
            let slots = node.connected.iter().flat_map(|node| node.slots.values());
            slots.map(move |slot| (node_id.clone(), slot.clone()))
        });
        let mut slots: Vec<_> = slots
            .filter(|(_, slot)| slot.provider == provider)
            .collect();
        slots.sort_by(|(_, a), (_, b)| a.slot_id.cmp(&b.slot_id));
        slots
    }

    /// Changes whenever a driver has reported something, or cannot be reached.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The connections to all nodes, and the ids of nodes that cannot be reached. These include
    /// nodes that have left the cluster a short while ago.
    #[must_use]
    pub fn channels(&self) -> (Vec<(String, Channel)>, Vec<String>) {
        self.channels_since(None)
    }

    /// As [`View::channels`], without nodes that had left before `moment`.
    #[must_use]
    pub fn channels_since(
        &self,
        moment: Option<SystemTime>,
    ) -> (Vec<(String, Channel)>, Vec<String>) {
        let age = moment.and_then(|moment| moment.elapsed().ok());
        let had_left = |node: &Node| match (node.left, age) {
            (Some(left), Some(age)) => left.elapsed() > age,
            _ => false,
        };
        let nodes = &self.lock().nodes;
        let channels = nodes.iter().filter_map(|(node_id, node)| {
            let connected = node.connected.as_ref()?;
            Some((node_id.clone(), connected.channel.clone()))
        });
        let unreachable = nodes
            .iter()
            .filter(|(_, node)| node.connected.is_none() && node.is_remembered())
            .filter(|(_, node)| !had_left(node))
            .map(|(node_id, _)| node_id.clone());
        (channels.collect(), unreachable.collect())
    }

    /// The connection to a node, as soon as there is one.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn channel(&self, node_id: &str) -> Channel {
        self.wait_for(|view| {
            let inner = view.lock();
            let connected = inner.nodes.get(node_id)?.connected.as_ref()?;
            Some(connected.channel.clone())
        })
        .await
    }

    /// The slot of a lease, if this shim has heard about it.
    #[must_use]
    pub fn leased(&self, run_id: RunId) -> Option<Kept> {
        let inner = self.lock();
        let key = inner.ready.of_run(run_id)?;
        let node = inner.nodes.get(&key.node_id)?.connected.as_ref()?;
        let slot = node.slots.get(&key.slot_id)?;
        (slot.state() == State::Leased).then(|| Kept {
            node_id: key.node_id.clone(),
            channel: node.channel.clone(),
            provider: slot.provider.clone(),
        })
    }

    /// The active runs in slots that Nomad has stopped on a node, with the connection to it.
    #[must_use]
    pub fn stopped_runs(&self, node_id: &str) -> Vec<(Channel, RunId)> {
        let nodes = &self.lock().nodes;
        let node = nodes.get(node_id).and_then(|node| node.connected.as_ref());
        let slots = node.into_iter().flat_map(|node| {
            let stopped = |slot: &&Slot| slot.state() == State::Draining;
            let slots = node.slots.values().filter(stopped);
            slots.filter_map(|slot| Some((node.channel.clone(), slot.run_id.parse().ok()?)))
        });
        slots.collect()
    }

    /// The number of connected nodes, and of nodes that cannot be reached.
    #[must_use]
    pub fn nodes(&self) -> (usize, usize) {
        let nodes = &self.lock().nodes;
        let (connected, others): (Vec<_>, Vec<_>) =
            nodes.values().partition(|node| node.connected.is_some());
        let ours = others.iter().filter(|node| node.left.is_none());
        (connected.len(), ours.count())
    }

    /// Adds a node to the cluster.
    pub(super) fn expect(&self, node_id: &str) {
        let is_ours = |node: &Node| node.left.is_none();
        if self.lock().nodes.get(node_id).is_some_and(is_ours) {
            return;
        }
        self.update(|inner| {
            inner.nodes.entry(node_id.to_owned()).or_default().left = None;
            inner.set_lost(node_id, false);
        });
    }

    /// Applies a report of a driver.
    pub(super) fn apply(&self, node_id: &str, channel: &Channel, told: WatchSlotsResponse) {
        let now = told.now.and_then(|now| SystemTime::try_from(now).ok());
        let clock = Clock {
            told: now.unwrap_or_else(SystemTime::now),
            heard: Instant::now(),
        };
        let since = told
            .since
            .and_then(|since| SystemTime::try_from(since).ok());
        self.update(|inner| {
            inner.used.apply(node_id, told.spent, told.snapshot);
            if told.snapshot {
                inner.disconnect(node_id);
                inner.held.clear(node_id);
            }
            let node = inner.nodes.entry(node_id.to_owned()).or_default();
            let node = node.connected.get_or_insert_with(|| Connected {
                channel: channel.clone(),
                start_id: told.start_id,
                identity: told.node_identity,
                // Older drivers do not report it.
                since: since.unwrap_or(SystemTime::UNIX_EPOCH),
                clock,
                slots: HashMap::new(),
                claiming: HashSet::new(),
            });
            node.clock = clock;
            for slot_id in told.removed {
                let slot_id = SlotId::from(slot_id);
                if let Some(slot) = node.slots.remove(&slot_id) {
                    inner.ready.remove(node_id, &slot);
                    inner.held.remove(node_id, &slot_id);
                }
            }
            for slot in told.slots {
                let slot_id = SlotId::from(slot.slot_id.as_str());
                if let Some(before) = node.slots.get(&slot_id) {
                    inner.ready.remove(node_id, before);
                }
                if !node.is_claiming(&slot) {
                    inner.ready.insert(node_id, &slot);
                }
                inner.held.put(node_id, &slot);
                node.slots.insert(slot_id, slot);
            }
        });
    }

    /// Removes the slots of a node whose connection broke.
    pub(super) fn disconnect(&self, node_id: &str) {
        self.update(|inner| {
            inner.disconnect(node_id);
            // The time for which the node is remembered starts now.
            let node = inner.nodes.get_mut(node_id);
            if let Some(left) = node.and_then(|node| node.left.as_mut()) {
                *left = Instant::now();
            }
        });
    }

    /// Marks a node as no longer part of the cluster. Its runs continue, and the node reports them
    /// while it is connected. Its slots get no new runs.
    pub(super) fn leave(&self, node_id: &str) {
        if self.has_left(node_id) {
            return;
        }
        self.update(|inner| {
            if let Some(node) = inner.nodes.get_mut(node_id) {
                node.left = Some(Instant::now());
            }
            inner.set_lost(node_id, true);
            let Inner {
                nodes, ready, held, ..
            } = inner;
            nodes.retain(|node_id, node| {
                let is_known = node.connected.is_some() || node.is_remembered();
                if !is_known {
                    ready.set_lost(node_id, false);
                    held.clear(node_id);
                }
                is_known
            });
        });
    }

    /// Whether a node is no longer part of the cluster.
    pub(super) fn has_left(&self, node_id: &str) -> bool {
        let nodes = &self.lock().nodes;
        nodes.get(node_id).is_none_or(|node| node.left.is_some())
    }

    fn update(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.lock());
        self.changed.send_modify(|version| *version += 1);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }
}

impl Node {
    fn is_remembered(&self) -> bool {
        self.left.is_none_or(|left| left.elapsed() < MEMORY_TIMEOUT)
    }
}

impl Inner {
    /// Sets whether the cluster has lost the node: pool slots of a lost node get no new runs.
    fn set_lost(&mut self, node_id: &str, lost: bool) {
        let Self { nodes, ready, .. } = self;
        let connected = nodes.get(node_id).and_then(|node| node.connected.as_ref());
        let free = |node: &Connected| -> Vec<Slot> {
            let pools = node.slots.values().filter(|slot| ready::is_pools(slot));
            let free = pools.filter(|slot| !node.is_claiming(slot));
            free.cloned().collect()
        };
        let slots = connected.map(free).unwrap_or_default();
        if lost {
            slots.iter().for_each(|slot| ready.remove(node_id, slot));
        }
        ready.set_lost(node_id, lost);
        if !lost {
            slots.iter().for_each(|slot| ready.insert(node_id, slot));
        }
    }

    fn disconnect(&mut self, node_id: &str) {
        self.held.lose(node_id);
        let node = self.nodes.get_mut(node_id);
        let slots = node.and_then(|node| node.connected.take());
        for slot in slots.iter().flat_map(|node| node.slots.values()) {
            self.ready.remove(node_id, slot);
        }
    }

    fn connected(&mut self, node_id: &str) -> Option<(&mut Connected, &mut Ready, &mut Held)> {
        let node = self.nodes.get_mut(node_id)?.connected.as_mut()?;
        Some((node, &mut self.ready, &mut self.held))
    }
}

impl Connected {
    fn is_claiming(&self, slot: &Slot) -> bool {
        // The set is nearly always empty.
        let mut claiming = self.claiming.iter();
        claiming.any(|(slot_id, generation)| {
            (slot_id.as_str(), generation.0) == (&slot.slot_id, slot.generation)
        })
    }
}

impl Default for View {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
