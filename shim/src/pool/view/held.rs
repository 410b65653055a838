//! What users have on all nodes, as their drivers report it: runs and leases, by whatever shim and
//! whatever call they came.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use polydev_proto::{
    id::{RunId, SlotId, UserId},
    node::{Slot, slot::State},
};

use super::{Inner, Node, View};

/// How long a lease can last (`TIMES` in `shim/src/run/lease.rs`).
const MAX_LEASE: Duration = Duration::from_secs(30 * 60);

/// A run or a lease in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Holding {
    user_id: UserId,
    run_id: RunId,
    is_lease: bool,
}

/// By user. What a node had that cannot be reached is still there until the node says otherwise.
#[derive(Debug, Default)]
pub(super) struct Held {
    nodes: HashMap<String, HashMap<SlotId, Holding>>,
    users: HashMap<UserId, HashMap<RunId, bool>>,
    /// The nodes that cannot be reached, since when.
    lost: HashMap<String, Instant>,
}

fn holding(slot: &Slot) -> Option<Holding> {
    let has = |state| slot.state() == state;
    let is_lease = has(State::Leased);
    if !(is_lease || has(State::Claimed) || has(State::Draining)) || slot.user_id.is_empty() {
        return None;
    }
    Some(Holding {
        user_id: slot.user_id.as_str().into(),
        run_id: slot.run_id.parse().ok()?,
        is_lease,
    })
}

impl Held {
    /// Takes what a slot has in place of what it had.
    pub(super) fn put(&mut self, node_id: &str, slot: &Slot) {
        let slot_id = SlotId::from(slot.slot_id.as_str());
        let now = holding(slot);
        if self
            .nodes
            .get(node_id)
            .and_then(|slots| slots.get(&slot_id))
            == now.as_ref()
        {
            return;
        }
        self.remove(node_id, &slot_id);
        if let Some(holding) = now {
            let runs = self.users.entry(holding.user_id.clone()).or_default();
            runs.insert(holding.run_id, holding.is_lease);
            let slots = self.nodes.entry(node_id.to_owned()).or_default();
            slots.insert(slot_id, holding);
        }
    }

    pub(super) fn remove(&mut self, node_id: &str, slot_id: &SlotId) {
        let slots = self.nodes.get_mut(node_id);
        if let Some(before) = slots.and_then(|slots| slots.remove(slot_id)) {
            self.forget(&before);
        }
    }

    /// The node cannot be reached.
    pub(super) fn lose(&mut self, node_id: &str) {
        if self.nodes.contains_key(node_id) {
            self.lost
                .entry(node_id.to_owned())
                .or_insert_with(Instant::now);
        }
    }

    /// Forgets what nodes had that are not known any more, and leases that are over, whoever says
    /// so or not.
    pub(super) fn forget_lost(&mut self, is_known: impl Fn(&str) -> bool) {
        let gone: Vec<String> = self
            .lost
            .keys()
            .filter(|id| !is_known(id))
            .cloned()
            .collect();
        gone.iter().for_each(|node_id| self.clear(node_id));
        let long = self
            .lost
            .iter()
            .filter(|(_, since)| since.elapsed() > MAX_LEASE);
        let long: Vec<String> = long.map(|(node_id, _)| node_id.clone()).collect();
        for node_id in long {
            let slots = self.nodes.get(&node_id).into_iter().flatten();
            let leases = slots.filter(|(_, holding)| holding.is_lease);
            let leases: Vec<SlotId> = leases.map(|(slot_id, _)| slot_id.clone()).collect();
            leases
                .iter()
                .for_each(|slot_id| self.remove(&node_id, slot_id));
        }
    }

    /// Nothing of what the node had is there any more.
    pub(super) fn clear(&mut self, node_id: &str) {
        self.lost.remove(node_id);
        for before in self.nodes.remove(node_id).unwrap_or_default().values() {
            self.forget(before);
        }
    }

    fn forget(&mut self, before: &Holding) {
        if let Some(runs) = self.users.get_mut(&before.user_id) {
            runs.remove(&before.run_id);
            if runs.is_empty() {
                self.users.remove(&before.user_id);
            }
        }
    }

    /// The runs and leases of a user, and which of them are leases.
    pub(super) fn of(&self, user_id: &UserId) -> Vec<(RunId, bool)> {
        let runs = self.users.get(user_id).into_iter().flatten();
        runs.map(|(run_id, is_lease)| (*run_id, *is_lease))
            .collect()
    }
}

impl View {
    /// The runs and leases of a user on all nodes, and which of them are leases.
    #[must_use]
    pub fn held(&self, user_id: &UserId) -> Vec<(RunId, bool)> {
        self.lock().held.of(user_id)
    }

    /// Forgets what lost nodes had, once it cannot be there any more.
    pub fn forget_held(&self) {
        let mut inner = self.lock();
        let Inner { nodes, held, .. } = &mut *inner;
        held.forget_lost(|node_id| nodes.get(node_id).is_some_and(Node::is_remembered));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(number: u32, state: State, user_id: &str, run_id: Option<RunId>) -> Slot {
        Slot {
            slot_id: format!("slot-{number}"),
            state: state.into(),
            user_id: user_id.into(),
            run_id: run_id.map(String::from).unwrap_or_default(),
            ..Slot::default()
        }
    }

    #[test]
    fn a_user_has_what_slots_say_until_they_say_something_else() {
        let (mut held, alice) = (Held::default(), UserId::from("alice"));
        let (run, lease) = (RunId::now(), RunId::now());
        held.put("a", &slot(1, State::Claimed, "alice", Some(run)));
        held.put("b", &slot(2, State::Leased, "alice", Some(lease)));
        held.put("b", &slot(3, State::Claimed, "bob", Some(RunId::now())));
        let mut of_alice = held.of(&alice);
        of_alice.sort();
        let mut expected = [(run, false), (lease, true)];
        expected.sort();
        assert_eq!(of_alice, expected);
        // The lease is used, and its slot drains.
        held.put("b", &slot(2, State::Draining, "alice", Some(lease)));
        held.put("a", &slot(1, State::Recycling, "", None));
        assert_eq!(held.of(&alice), [(lease, false)]);
        // A node that is away keeps what it had, as long as it is known.
        held.lose("b");
        held.forget_lost(|_| true);
        assert_eq!(held.of(&alice), [(lease, false)]);
        held.forget_lost(|_| false);
        assert_eq!(held.of(&alice), []);
        assert!(held.users.is_empty() && held.lost.is_empty());
    }
}
