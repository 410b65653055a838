//! The slots of a node, and the shims that watch them.

mod lease;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use futures_util::{Stream, StreamExt, stream};
use polydev_proto::{
    broker::{Egress, PROTOCOL_VERSION},
    node::{Claim, Slot, Spent, WatchSlotsResponse, slot::State},
};
use prost_types::Timestamp;
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Options, lock};

/// The start id of a node, which starts only once.
pub(super) const START_ID: &str = "start";
/// How many changes may wait for a shim. The shim misses further changes.
const CHANGES: usize = 1024;

type Watcher = mpsc::Sender<WatchSlotsResponse>;

pub(super) struct Slots {
    refill: Duration,
    since: Option<Timestamp>,
    identity: String,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    all: Vec<Slot>,
    /// How many slots were ever made.
    made: usize,
    /// The users of leases, by the ids of their runs.
    holders: HashMap<String, String>,
    watchers: Vec<Watcher>,
}

impl Slots {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            refill: options.refill,
            since: options.since.map(Timestamp::from),
            identity: options.identity.clone(),
            inner: Mutex::default(),
        }
    }

    /// Adds idle slots to a pool.
    pub(super) fn add(&self, node_id: &str, provider: &str, count: usize) {
        let mut inner = lock(&self.inner);
        let Inner {
            all,
            made,
            watchers,
            ..
        } = &mut *inner;
        let first = all.len();
        all.extend((*made..*made + count).map(|number| idle(node_id, provider, number)));
        *made += count;
        self.report(watchers, &all[first..], &[]);
    }

    /// Adds an idle slot for one run.
    pub(super) fn add_for(
        &self,
        node_id: &str,
        provider: &str,
        run_id: &str,
        egress: Option<Egress>,
    ) {
        let mut inner = lock(&self.inner);
        let Inner {
            all,
            made,
            watchers,
            ..
        } = &mut *inner;
        let slot = Slot {
            job_id: format!("polydev-on-demand-{provider}"),
            for_run_id: run_id.into(),
            egress,
            ..idle(node_id, provider, *made)
        };
        *made += 1;
        self.report(watchers, std::slice::from_ref(&slot), &[]);
        all.push(slot);
    }

    pub(super) fn change_all(&self, change: impl FnMut(&mut Slot)) {
        let mut inner = lock(&self.inner);
        let Inner { all, watchers, .. } = &mut *inner;
        all.iter_mut().for_each(change);
        self.report(watchers, all, &[]);
    }

    pub(super) fn remove(&self, provider: &str) {
        let mut inner = lock(&self.inner);
        let Inner { all, watchers, .. } = &mut *inner;
        let gone = all.extract_if(.., |slot| slot.provider == provider);
        let gone: Vec<String> = gone.map(|slot| slot.slot_id).collect();
        self.report(watchers, &[], &gone);
    }

    /// Gives a claim its slot, if the claim may have the slot.
    pub(super) fn take(&self, claim: &Claim) -> bool {
        let mut inner = lock(&self.inner);
        let Inner {
            all,
            holders,
            watchers,
            ..
        } = &mut *inner;
        let Some(slot) = all.iter_mut().find(|slot| slot.slot_id == claim.slot_id) else {
            return false;
        };
        let is_its = match slot.state() {
            State::Idle => slot.for_run_id.is_empty() || slot.for_run_id == claim.run_id,
            State::Leased => {
                slot.run_id == claim.run_id && holders.get(&slot.run_id) == Some(&claim.user_id)
            }
            _ => false,
        };
        if !is_its || slot.generation != claim.generation {
            return false;
        }
        slot.set_state(State::Claimed);
        slot.run_id.clone_from(&claim.run_id);
        slot.user_id.clone_from(&claim.user_id);
        self.report(watchers, std::slice::from_ref(&*slot), &[]);
        true
    }

    pub(super) fn find(&self, slot_id: &str) -> Option<Slot> {
        let inner = lock(&self.inner);
        let slot = inner.all.iter().find(|slot| slot.slot_id == slot_id);
        slot.cloned()
    }

    /// Makes a slot idle after the refill time, with another container. A slot that was made for a
    /// run is removed instead.
    pub(super) fn refill(self: &Arc<Self>, slot_id: String) {
        let slots = self.clone();
        tokio::spawn(async move {
            sleep(slots.refill).await;
            slots.renew(slot_id);
        });
    }

    fn renew(&self, slot_id: String) {
        let mut inner = lock(&self.inner);
        let Inner { all, watchers, .. } = &mut *inner;
        let Some(at) = all.iter().position(|slot| slot.slot_id == slot_id) else {
            return;
        };
        if !all[at].for_run_id.is_empty() {
            all.remove(at);
            self.report(watchers, &[], &[slot_id]);
            return;
        }
        let slot = &mut all[at];
        slot.set_state(State::Idle);
        slot.run_id.clear();
        slot.user_id.clear();
        slot.generation += 1;
        self.report(watchers, std::slice::from_ref(&*slot), &[]);
    }

    fn change(&self, slot_id: &str, change: impl FnOnce(&mut Slot)) {
        let mut inner = lock(&self.inner);
        let Inner { all, watchers, .. } = &mut *inner;
        if let Some(slot) = all.iter_mut().find(|slot| slot.slot_id == slot_id) {
            change(slot);
            self.report(watchers, std::slice::from_ref(&*slot), &[]);
        }
    }

    /// Reports what a user has used; to those who watch now.
    pub(super) fn spend(&self, spent: &Spent) {
        for watcher in &lock(&self.inner).watchers {
            let message = WatchSlotsResponse {
                spent: vec![spent.clone()],
                ..self.message(Vec::new(), Vec::new())
            };
            let _gone = watcher.try_send(message);
        }
    }

    /// All slots first, and then every change.
    pub(super) fn watch(
        &self,
    ) -> impl Stream<Item = Result<WatchSlotsResponse, Status>> + Send + use<> {
        let (watcher, changes) = mpsc::channel(CHANGES);
        let mut inner = lock(&self.inner);
        inner.watchers.push(watcher);
        let first = WatchSlotsResponse {
            snapshot: true,
            ..self.message(inner.all.clone(), Vec::new())
        };
        stream::iter([Ok(first)]).chain(ReceiverStream::new(changes).map(Ok))
    }

    /// How many slots exist, and how many of them are in `state`.
    pub(super) fn count(&self, state: State) -> [u32; 2] {
        let inner = lock(&self.inner);
        let in_state = inner.all.iter().filter(|slot| slot.state() == state);
        let counts = [inner.all.len(), in_state.count()];
        counts.map(|count| u32::try_from(count).unwrap_or(u32::MAX))
    }

    fn report(&self, watchers: &mut Vec<Watcher>, slots: &[Slot], removed: &[String]) {
        watchers.retain(|watcher| {
            let message = self.message(slots.to_vec(), removed.to_vec());
            let sent = watcher.try_send(message);
            !matches!(sent, Err(TrySendError::Closed(_)))
        });
    }

    fn message(&self, slots: Vec<Slot>, removed: Vec<String>) -> WatchSlotsResponse {
        WatchSlotsResponse {
            start_id: START_ID.into(),
            now: Some(Timestamp::from(SystemTime::now())),
            since: self.since,
            snapshot: false,
            slots,
            removed,
            spent: Vec::new(),
            node_identity: self.identity.clone(),
        }
    }
}

pub(super) fn not_idle() -> Status {
    Status::failed_precondition("the slot is not idle")
}

fn idle(node_id: &str, provider: &str, number: usize) -> Slot {
    let alloc_id = format!("{number:08}-1111-4111-8111-111111111111");
    Slot {
        slot_id: format!("{node_id}/{alloc_id}"),
        provider: provider.into(),
        image: format!("polydev-{provider}-runtime:latest"),
        state: State::Idle.into(),
        generation: 1,
        since: Some(Timestamp::from(SystemTime::now())),
        namespace: "default".into(),
        job_id: format!("polydev-pool-{provider}"),
        alloc_id,
        public_key: vec![7; 32].into(),
        broker_key: vec![8; 32].into(),
        broker_version: PROTOCOL_VERSION,
        ..Slot::default()
    }
}
