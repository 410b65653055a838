//! The live view: slots by node, and a way to wait for an idle one. Nothing in it
//! is certain, since a driver may have changed its mind meanwhile: it decides.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use polydev_proto::node::{Slot, WatchSlotsResponse, slot::State};
use rand::seq::IteratorRandom;
use tokio::sync::watch;
use tonic::transport::Channel;

/// What drivers have told; clones share it.
#[derive(Debug, Clone)]
pub struct View {
    nodes: Arc<Mutex<HashMap<String, Node>>>,
    changed: Arc<watch::Sender<u64>>,
}

/// A node that is or was connected.
#[derive(Debug, Default)]
struct Node {
    /// `None` while it cannot be reached: its slots are not to be had then.
    connected: Option<Connected>,
    /// When it was no longer one of the cluster's: for a while it may still have runs.
    left: Option<Instant>,
}

/// As long as a driver remembers its runs.
const REMEMBERED: Duration = Duration::from_secs(70 * 60);

#[derive(Debug)]
struct Connected {
    channel: Channel,
    start_id: String,
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

/// An idle slot, taken out of the view while it is tried.
#[derive(Debug)]
pub struct Candidate {
    pub node_id: String,
    pub channel: Channel,
    pub start_id: String,
    pub slot_id: String,
    pub generation: u64,
    /// Of its container: what secrets are sealed to.
    pub public_key: Bytes,
    /// It was made for one run.
    pub on_demand: bool,
    clock: Clock,
    view: View,
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
            nodes: Arc::default(),
            changed: Arc::new(watch::Sender::new(0)),
        }
    }

    /// A random idle slot of `provider`, as soon as there is one. The slot is not
    /// offered to another run of this shim until the candidate is dropped.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn idle_slot(&self, provider: &str) -> Candidate {
        self.wait_for(|view| {
            view.take(|slot| {
                slot.state() == State::Idle
                    && slot.for_run_id.is_empty()
                    && slot.provider == provider
            })
        })
        .await
    }

    /// The slot that was made on demand for a run, or is leased for it, as soon as it is ready.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn slot_for(&self, run_id: &str) -> Candidate {
        self.wait_for(|view| {
            view.take(|slot| match slot.state() {
                State::Idle => slot.for_run_id == run_id,
                State::Leased => slot.run_id == run_id,
                _ => false,
            })
        })
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

    /// A random one of the slots that `fit`, and are not being claimed.
    fn take(&self, fits: impl Fn(&Slot) -> bool) -> Option<Candidate> {
        let mut nodes = self.lock();
        let idle = nodes.iter_mut().flat_map(|(node_id, node)| {
            let connected = node.connected.iter();
            connected
                .flat_map(move |node| node.slots.values().map(move |slot| (node_id, node, slot)))
        });
        let idle = idle.filter(|(_, node, slot)| {
            fits(slot)
                && !node
                    .claiming
                    .contains(&(slot.slot_id.clone(), slot.generation))
        });
        let (node_id, node, slot) = idle.choose(&mut rand::rng())?;
        let candidate = Candidate {
            node_id: node_id.clone(),
            channel: node.channel.clone(),
            start_id: node.start_id.clone(),
            slot_id: slot.slot_id.clone(),
            generation: slot.generation,
            public_key: slot.public_key.clone(),
            on_demand: !slot.for_run_id.is_empty(),
            clock: node.clock,
            view: self.clone(),
        };
        if let Some(Node {
            connected: Some(node),
            ..
        }) = nodes.get_mut(&candidate.node_id)
        {
            node.claiming
                .insert((candidate.slot_id.clone(), candidate.generation));
        }
        Some(candidate)
    }

    /// Slots by provider and state.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<String, Counts> {
        let mut pools: BTreeMap<String, Counts> = BTreeMap::new();
        for slot in self
            .lock()
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
        let nodes = self.lock();
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
        let nodes = self.lock();
        let channels = nodes.iter().filter_map(|(node_id, node)| {
            let connected = node.connected.as_ref()?;
            Some((node_id.clone(), connected.channel.clone()))
        });
        let unreachable = nodes
            .iter()
            .filter(|(_, node)| node.connected.is_none())
            .map(|(node_id, _)| node_id.clone());
        (channels.collect(), unreachable.collect())
    }

    /// The connection to a node, as soon as there is one.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn channel(&self, node_id: &str) -> Channel {
        self.wait_for(|view| {
            let nodes = view.lock();
            let connected = nodes.get(node_id)?.connected.as_ref()?;
            Some(connected.channel.clone())
        })
        .await
    }

    /// Where a lease is, if this shim has heard of it.
    #[must_use]
    pub fn leased(&self, run_id: &str) -> Option<Kept> {
        let nodes = self.lock();
        let is_it = |slot: &&Slot| slot.state() == State::Leased && slot.run_id == run_id;
        nodes.iter().find_map(|(node_id, node)| {
            let node = node.connected.as_ref()?;
            let slot = node.slots.values().find(is_it)?;
            Some(Kept {
                node_id: node_id.clone(),
                channel: node.channel.clone(),
                provider: slot.provider.clone(),
            })
        })
    }

    /// The runs that go on in slots of a node which Nomad has stopped, with the way there.
    #[must_use]
    pub fn stopped_runs(&self, node_id: &str) -> Vec<(Channel, String)> {
        let nodes = self.lock();
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
        let nodes = self.lock();
        let ours = || nodes.values().filter(|node| node.left.is_none());
        let connected = ours().filter(|node| node.connected.is_some()).count();
        (connected, ours().count() - connected)
    }

    /// A node is to be followed, and is not yet.
    pub(super) fn expect(&self, node_id: &str) {
        self.update(|nodes| {
            nodes.entry(node_id.to_owned()).or_default().left = None;
        });
    }

    /// A driver has told something.
    pub(super) fn apply(&self, node_id: &str, channel: &Channel, told: WatchSlotsResponse) {
        let now = told.now.and_then(|now| SystemTime::try_from(now).ok());
        let clock = Clock {
            told: now.unwrap_or_else(SystemTime::now),
            heard: Instant::now(),
        };
        self.update(|nodes| {
            let node = nodes.entry(node_id.to_owned()).or_default();
            if told.snapshot {
                node.connected = None;
            }
            let node = node.connected.get_or_insert_with(|| Connected {
                channel: channel.clone(),
                start_id: told.start_id,
                clock,
                slots: HashMap::new(),
                claiming: HashSet::new(),
            });
            node.clock = clock;
            for slot_id in told.removed {
                node.slots.remove(&slot_id);
            }
            for slot in told.slots {
                node.slots.insert(slot.slot_id.clone(), slot);
            }
        });
    }

    /// The connection to a node broke; it will be tried again.
    pub(super) fn disconnect(&self, node_id: &str) {
        self.update(|nodes| {
            if let Some(node) = nodes.get_mut(node_id) {
                node.connected = None;
            }
        });
    }

    /// A node is no longer one of ours. That Nomad has lost it does not end its runs.
    pub(super) fn leave(&self, node_id: &str) {
        self.update(|nodes| {
            if let Some(node) = nodes.get_mut(node_id) {
                node.connected = None;
                node.left = Some(Instant::now());
            }
            nodes.retain(|_, node| node.left.is_none_or(|left| left.elapsed() < REMEMBERED));
        });
    }

    fn update(&self, change: impl FnOnce(&mut HashMap<String, Node>)) {
        change(&mut self.lock());
        self.changed.send_modify(|version| *version += 1);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for View {
    fn default() -> Self {
        Self::new()
    }
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
        self.view.update(|nodes| {
            let node = nodes
                .get_mut(&self.node_id)
                .and_then(|node| node.connected.as_mut());
            let slot = node.and_then(|node| node.slots.get_mut(&self.slot_id));
            if let Some(slot) = slot.filter(|slot| slot.generation == self.generation) {
                change(slot);
            }
        });
    }
}

impl Drop for Candidate {
    fn drop(&mut self) {
        let claimed = (std::mem::take(&mut self.slot_id), self.generation);
        self.view.update(|nodes| {
            if let Some(Node {
                connected: Some(node),
                ..
            }) = nodes.get_mut(&self.node_id)
            {
                node.claiming.remove(&claimed);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::transport::Endpoint;

    fn slot(id: &str, state: State, generation: u64) -> Slot {
        Slot {
            slot_id: id.into(),
            provider: "openai".into(),
            state: state.into(),
            generation,
            ..Default::default()
        }
    }

    fn tell(view: &View, snapshot: bool, slots: Vec<Slot>, removed: &[&str]) {
        let channel = Endpoint::from_static("unix:///nowhere").connect_lazy();
        let removed = removed.iter().map(|id| (*id).to_owned()).collect();
        let told = WatchSlotsResponse {
            snapshot,
            slots,
            removed,
            start_id: "s".into(),
            now: None,
        };
        view.apply("node", &channel, told);
    }

    #[tokio::test]
    async fn two_runs_of_one_shim_never_try_the_same_container() {
        let view = View::new();
        tell(
            &view,
            true,
            vec![slot("a", State::Idle, 1), slot("b", State::Idle, 1)],
            &[],
        );
        let (first, second) = (
            view.idle_slot("openai").await,
            view.idle_slot("openai").await,
        );
        assert_ne!(first.slot_id, second.slot_id);
        assert!(view.take(|_| true).is_none());

        let freed = first.slot_id.clone();
        drop(first);
        assert_eq!(view.take(|_| true).unwrap().slot_id, freed);
    }

    #[tokio::test]
    async fn a_slot_on_demand_is_for_its_run_alone() {
        let view = View::new();
        let made = Slot {
            for_run_id: "run".into(),
            ..slot("a", State::Idle, 1)
        };
        tell(&view, true, vec![made], &[]);
        tokio::select! {
            biased;
            _ = view.idle_slot("openai") => panic!("it is no slot of the pool"),
            _ = view.slot_for("other") => panic!("it is another run's"),
            slot = view.slot_for("run") => assert_eq!(slot.slot_id, "a"),
        }
        let counts = view.counts()["openai"];
        assert_eq!((counts.idle, counts.on_demand), (0, 1));
    }

    #[tokio::test]
    async fn a_run_waits_until_a_slot_is_idle() {
        let view = View::new();
        tell(&view, true, vec![slot("a", State::Warming, 1)], &[]);
        let waiting = view.idle_slot("openai");
        tokio::pin!(waiting);
        tokio::select! {
            biased;
            _ = &mut waiting => panic!("nothing is idle"),
            () = tokio::task::yield_now() => {}
        }
        tell(&view, false, vec![slot("a", State::Idle, 1)], &[]);
        assert_eq!(waiting.await.slot_id, "a");
    }

    #[tokio::test]
    async fn slots_that_are_gone_or_out_of_reach_are_not_counted() {
        let view = View::new();
        view.expect("node");
        assert_eq!(view.nodes(), (0, 1));
        tell(
            &view,
            true,
            vec![slot("a", State::Idle, 1), slot("b", State::Claimed, 3)],
            &[],
        );
        assert_eq!(view.nodes(), (1, 0));
        assert_eq!(
            view.counts()["openai"],
            Counts {
                idle: 1,
                claimed: 1,
                ..Counts::default()
            }
        );
        tell(&view, false, vec![], &["a"]);
        assert_eq!(
            view.counts()["openai"],
            Counts {
                claimed: 1,
                ..Counts::default()
            }
        );
        view.disconnect("node");
        assert!(view.counts().is_empty());
    }
}
