//! The live view: slots by node, and a way to wait for an idle one. Nothing in it
//! is certain, since a driver may have changed its mind meanwhile: it decides.

mod candidate;
mod ready;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use polydev_proto::node::{Slot, WatchSlotsResponse, slot::State};
use tokio::sync::watch;
use tonic::transport::Channel;

pub use candidate::Candidate;
use ready::{Key, Ready};

/// What drivers have told; clones share it.
#[derive(Debug, Clone)]
pub struct View {
    inner: Arc<Mutex<Inner>>,
    changed: Arc<watch::Sender<u64>>,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: HashMap<String, Node>,
    /// Of the slots of connected nodes, those that may be taken.
    ready: Ready,
}

/// A node that is or was connected.
#[derive(Debug, Default)]
struct Node {
    /// `None` while it cannot be reached: its slots are not to be had then.
    connected: Option<Connected>,
    /// Since when it is no longer one of the cluster's: for a while it may still have runs.
    left: Option<Instant>,
}

/// As long as a driver remembers its runs.
const REMEMBERED: Duration = Duration::from_secs(70 * 60);

#[derive(Debug)]
struct Connected {
    channel: Channel,
    start_id: String,
    /// When its journal was begun.
    since: SystemTime,
    clock: Clock,
    slots: HashMap<String, Slot>,
    /// Slots, with generation, that a run of this shim is claiming right now.
    claiming: HashSet<(String, u64)>,
}

/// The driver's clock as last heard, carried on by ours.
#[derive(Debug, Clone, Copy)]
struct Clock {
    told: SystemTime,
    heard: Instant,
}

/// A slot that is kept for a run to come.
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
    /// Made for one run each, whatever their state; counted nowhere else.
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

    /// As [`View::idle_slot`], on a node that is not `full`; `None` if a short look finds none.
    #[must_use]
    pub fn idle_beyond(&self, provider: &str, full: &BTreeSet<String>) -> Option<Candidate> {
        self.take(|ready| ready.beyond(provider, full))
    }

    /// The slot that was made on demand for a run, or is leased for it, as soon as it is ready.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn slot_for(&self, run_id: &str) -> Candidate {
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

    /// The slot that is `chosen`, if there is one; it is not ready any more then.
    fn take(&self, chosen: impl FnOnce(&Ready) -> Option<&Key>) -> Option<Candidate> {
        let mut inner = self.lock();
        let Inner { nodes, ready } = &mut *inner;
        let key = chosen(ready)?.clone();
        let node = nodes.get_mut(&key.node_id)?.connected.as_mut()?;
        let slot = node.slots.get(&key.slot_id)?;
        ready.remove(&key.node_id, slot);
        node.claiming
            .insert((slot.slot_id.clone(), slot.generation));
        Some(Candidate {
            channel: node.channel.clone(),
            start_id: node.start_id.clone(),
            since: node.since,
            provider: slot.provider.clone(),
            generation: slot.generation,
            public_key: slot.public_key.clone(),
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
                // A state of a newer driver is nothing to count on.
                State::Unspecified => {}
            }
        }
        pools
    }

    /// A provider's slots with their nodes' ids, in their order.
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

    /// Changes whenever a driver has told something, or is out of reach.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The connections to all nodes, and the names of those that cannot be reached, also of
    /// those that have left a short while ago.
    #[must_use]
    pub fn channels(&self) -> (Vec<(String, Channel)>, Vec<String>) {
        self.channels_since(None)
    }

    /// The same without nodes that had left before that moment.
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

    /// Where a lease is, if this shim has heard of it.
    #[must_use]
    pub fn leased(&self, run_id: &str) -> Option<Kept> {
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

    /// The runs that go on in slots of a node which Nomad has stopped, with the way there.
    #[must_use]
    pub fn stopped_runs(&self, node_id: &str) -> Vec<(Channel, String)> {
        let nodes = &self.lock().nodes;
        let node = nodes.get(node_id).and_then(|node| node.connected.as_ref());
        let slots = node.into_iter().flat_map(|node| {
            let stopped = |slot: &&Slot| slot.state() == State::Draining && !slot.run_id.is_empty();
            let slots = node.slots.values().filter(stopped);
            slots.map(|slot| (node.channel.clone(), slot.run_id.clone()))
        });
        slots.collect()
    }

    /// Nodes that are followed, and nodes that cannot be reached.
    #[must_use]
    pub fn nodes(&self) -> (usize, usize) {
        let nodes = &self.lock().nodes;
        let (connected, others): (Vec<_>, Vec<_>) =
            nodes.values().partition(|node| node.connected.is_some());
        let ours = others.iter().filter(|node| node.left.is_none());
        (connected.len(), ours.count())
    }

    /// A node is one of ours, and to be followed.
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

    /// A driver has told something.
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
            if told.snapshot {
                inner.disconnect(node_id);
            }
            let node = inner.nodes.entry(node_id.to_owned()).or_default();
            let node = node.connected.get_or_insert_with(|| Connected {
                channel: channel.clone(),
                start_id: told.start_id,
                // A driver of before does not say.
                since: since.unwrap_or(SystemTime::UNIX_EPOCH),
                clock,
                slots: HashMap::new(),
                claiming: HashSet::new(),
            });
            node.clock = clock;
            for slot_id in told.removed {
                if let Some(slot) = node.slots.remove(&slot_id) {
                    inner.ready.remove(node_id, &slot);
                }
            }
            for slot in told.slots {
                if let Some(before) = node.slots.get(&slot.slot_id) {
                    inner.ready.remove(node_id, before);
                }
                if !node.is_claiming(&slot) {
                    inner.ready.insert(node_id, &slot);
                }
                node.slots.insert(slot.slot_id.clone(), slot);
            }
        });
    }

    /// The connection to a node broke.
    pub(super) fn disconnect(&self, node_id: &str) {
        self.update(|inner| {
            inner.disconnect(node_id);
            // What it told until now is remembered from now on.
            let node = inner.nodes.get_mut(node_id);
            if let Some(left) = node.and_then(|node| node.left.as_mut()) {
                *left = Instant::now();
            }
        });
    }

    /// A node is no longer one of ours. That Nomad has lost it does not end its runs, nor what
    /// it tells of them while it is connected; its slots get no new ones.
    pub(super) fn leave(&self, node_id: &str) {
        if self.has_left(node_id) {
            return;
        }
        self.update(|inner| {
            if let Some(node) = inner.nodes.get_mut(node_id) {
                node.left = Some(Instant::now());
            }
            inner.set_lost(node_id, true);
            let Inner { nodes, ready } = inner;
            nodes.retain(|node_id, node| {
                let is_known = node.connected.is_some() || node.is_remembered();
                if !is_known {
                    ready.set_lost(node_id, false);
                }
                is_known
            });
        });
    }

    /// Whether a node is no longer one of ours.
    pub(super) fn has_left(&self, node_id: &str) -> bool {
        let nodes = &self.lock().nodes;
        nodes.get(node_id).is_none_or(|node| node.left.is_some())
    }

    fn update(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.lock());
        self.changed.send_modify(|version| *version += 1);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Node {
    fn is_remembered(&self) -> bool {
        self.left.is_none_or(|left| left.elapsed() < REMEMBERED)
    }
}

impl Inner {
    /// Whether the pools' slots of the node are for new runs.
    fn set_lost(&mut self, node_id: &str, lost: bool) {
        let Self { nodes, ready } = self;
        ready.set_lost(node_id, false);
        let connected = nodes.get(node_id).and_then(|node| node.connected.as_ref());
        let free = |node: &Connected| -> Vec<Slot> {
            let pools = node.slots.values().filter(|slot| ready::is_pools(slot));
            let free = pools.filter(|slot| !node.is_claiming(slot));
            free.cloned().collect()
        };
        let slots = connected.map(free).unwrap_or_default();
        slots.iter().for_each(|slot| ready.remove(node_id, slot));
        ready.set_lost(node_id, lost);
        slots.iter().for_each(|slot| ready.insert(node_id, slot));
    }

    fn disconnect(&mut self, node_id: &str) {
        let node = self.nodes.get_mut(node_id);
        let slots = node.and_then(|node| node.connected.take());
        for slot in slots.iter().flat_map(|node| node.slots.values()) {
            self.ready.remove(node_id, slot);
        }
    }

    fn connected(&mut self, node_id: &str) -> Option<(&mut Connected, &mut Ready)> {
        let node = self.nodes.get_mut(node_id)?.connected.as_mut()?;
        Some((node, &mut self.ready))
    }
}

impl Connected {
    fn is_claiming(&self, slot: &Slot) -> bool {
        // Nearly always empty.
        let mut claiming = self.claiming.iter();
        claiming
            .any(|(slot_id, generation)| (slot_id, *generation) == (&slot.slot_id, slot.generation))
    }
}

impl Default for View {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
