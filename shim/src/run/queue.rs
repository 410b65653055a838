//! Runs that wait for a slot, in an order that is fair between users. The user with the fewest
//! runs comes first, then the user who was served longest ago, then the run that came first.
//! Each shim has its own queues. A user's runs are counted on all nodes, whoever started them: a
//! shim hears of another shim's within a second.

use std::{collections::HashMap, sync::Arc};

use parking_lot::{Mutex, MutexGuard};
use polydev_proto::id::{RunId, UserId};
use tokio::sync::watch;

use crate::pool::View;

/// Runs that may wait in one shim.
pub const MAX_WAITING: usize = 1000;

/// Limits for each user.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct PerUser {
    /// Active runs and leases that a user may have on all nodes; further runs wait. A run with a
    /// lease does not wait, but counts. [default: no limit]
    #[arg(long = "user-running", value_name = "RUNS", value_parser = clap::value_parser!(u32).range(1..))]
    pub running: Option<u32>,
    /// Leases that a user may have on all nodes; further ones wait.
    #[arg(long = "user-leases", value_name = "LEASES", default_value_t = 10)]
    pub leases: u32,
    /// Waiting runs of one user that this shim allows; further ones are refused.
    #[arg(long = "user-queued", value_name = "RUNS", default_value_t = 100)]
    pub queued: u32,
}

/// A run is refused because too many runs wait.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    #[error("{MAX_WAITING} runs are waiting already; this shim allows no more")]
    Shim,
    #[error("user `{user_id}` has {most} runs waiting already; this shim allows no more")]
    User { user_id: UserId, most: u32 },
    #[error(
        "user `{user_id}` has most of the {MAX_WAITING} waiting runs, and another user's run came: \
         this one gave up its place"
    )]
    Evicted { user_id: UserId },
}

/// What waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    Run(RunId),
    /// A slot for a later run.
    Lease,
}

impl Wants {
    fn run_id(self) -> Option<RunId> {
        match self {
            Self::Run(run_id) => Some(run_id),
            Self::Lease => None,
        }
    }
}

/// The queues of a shim; clones share them.
#[derive(Debug, Clone)]
pub struct Queue {
    inner: Arc<Mutex<Inner>>,
    view: View,
}

#[derive(Debug)]
struct Inner {
    per_user: PerUser,
    /// What users have on all nodes.
    view: View,
    waiting: Vec<Waiting>,
    users: HashMap<UserId, User>,
    /// Counts the runs that came, and the runs that were served.
    next: u64,
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    provider: &'static str,
    user_id: UserId,
    wants: Wants,
    place: watch::Sender<Place>,
}

#[derive(Debug, Default)]
struct User {
    /// What this shim carries of theirs, by number.
    carried: HashMap<u64, Wants>,
    served: u64,
}

/// A run's position in its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// This number of runs are ahead.
    Behind(usize),
    /// The run's user has as many active runs as allowed. This number of runs are ahead.
    Held(usize),
    /// The next idle slot is for this run.
    Next,
    /// None: another user's run has it.
    Evicted,
}

/// A run's place in the queue. Drop gives it up.
#[derive(Debug)]
pub struct Ticket {
    queue: Queue,
    number: u64,
    provider: &'static str,
    user_id: UserId,
    wants: Wants,
    pub place: watch::Receiver<Place>,
}

/// An active run, which ends when this is dropped.
#[derive(Debug)]
pub struct Running {
    queue: Queue,
    number: u64,
    provider: &'static str,
    user_id: UserId,
    wants: Wants,
}

impl Queue {
    #[must_use]
    pub fn new(per_user: PerUser, view: View) -> Self {
        let inner = Inner {
            per_user,
            view: view.clone(),
            waiting: Vec::new(),
            users: HashMap::new(),
            next: 0,
        };
        Self {
            inner: Arc::new(inner.into()),
            view,
        }
    }

    /// Lets waiting runs go on when their users' runs end elsewhere. Never returns.
    pub async fn keep(&self) {
        let mut changes = self.view.changes();
        while changes.changed().await.is_ok() {
            let mut inner = self.lock();
            let is_held = |one: &Waiting| matches!(*one.place.borrow(), Place::Held(_));
            if inner.waiting.iter().any(is_held) {
                inner.order();
            }
        }
        unreachable!("the sender is in `self`");
    }

    /// Puts a run into the queue. If the queue is full, a run of the user with most waiting ones
    /// makes room, unless it is this user.
    ///
    /// # Errors
    /// [`Full`]
    pub fn enter(
        &self,
        provider: &'static str,
        user_id: &UserId,
        wants: Wants,
    ) -> Result<Ticket, Full> {
        let mut inner = self.lock();
        let queued = inner.queued(user_id);
        let most = inner.per_user.queued;
        if queued >= most as usize {
            let user_id = user_id.clone();
            return Err(Full::User { user_id, most });
        }
        if inner.waiting.len() >= MAX_WAITING && !inner.evict_for(queued) {
            return Err(Full::Shim);
        }
        inner.next += 1;
        let number = inner.next;
        drop(inner);
        Ok(self.insert(number, provider, user_id.clone(), wants))
    }

    /// Counts a run that does not wait, because its lease has waited.
    #[must_use]
    pub fn pass(&self, provider: &'static str, user_id: &UserId, run_id: RunId) -> Running {
        let wants = Wants::Run(run_id);
        let mut inner = self.lock();
        inner.next += 1;
        let number = inner.next;
        inner.serve(number, user_id, wants);
        inner.order();
        drop(inner);
        Running {
            queue: self.clone(),
            number,
            provider,
            user_id: user_id.clone(),
            wants,
        }
    }

    fn insert(&self, number: u64, provider: &'static str, user_id: UserId, wants: Wants) -> Ticket {
        let (place, receiver) = watch::channel(Place::Behind(usize::MAX));
        let mut inner = self.lock();
        inner.waiting.push(Waiting {
            number,
            provider,
            user_id: user_id.clone(),
            wants,
            place,
        });
        inner.order();
        Ticket {
            queue: self.clone(),
            number,
            provider,
            user_id,
            wants,
            place: receiver,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }
}

impl Ticket {
    /// Waits until the next idle slot is for this run.
    ///
    /// # Errors
    /// [`Full::Evicted`]
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn turn(&mut self) -> Result<(), Full> {
        let is_over = |place: &Place| matches!(place, Place::Next | Place::Evicted);
        // The sender lives as long as the run waits. It goes when the run is evicted.
        match self.place.wait_for(is_over).await.as_deref() {
            Ok(Place::Next) => Ok(()),
            _ => Err(Full::Evicted {
                user_id: self.user_id.clone(),
            }),
        }
    }

    /// Takes the run out of the queue: it has a slot to claim. From now on it counts as an active
    /// run of its user. If it does not get the slot, [`Running::back`] puts it back.
    #[must_use]
    pub fn served(self) -> Running {
        let (number, wants) = (self.number, self.wants);
        self.queue.lock().serve(number, &self.user_id, wants);
        Running {
            queue: self.queue.clone(),
            number,
            provider: self.provider,
            user_id: self.user_id.clone(),
            wants,
        }
    }
}

impl Running {
    /// Puts the run back at its place in the queue: it did not get its slot.
    #[must_use]
    pub fn back(self) -> Ticket {
        self.queue
            .insert(self.number, self.provider, self.user_id.clone(), self.wants)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut inner = self.queue.lock();
        inner.waiting.retain(|one| one.number != self.number);
        inner.order();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut inner = self.queue.lock();
        if let Some(user) = inner.users.get_mut(&self.user_id) {
            user.carried.remove(&self.number);
        }
        inner.order();
    }
}

impl Inner {
    fn queued(&self, user_id: &UserId) -> usize {
        self.waiting
            .iter()
            .filter(|one| one.user_id == *user_id)
            .count()
    }

    /// Makes room for a user who has so many waiting runs. Returns whether there is some.
    fn evict_for(&mut self, queued: usize) -> bool {
        let mut counts: HashMap<&UserId, usize> = HashMap::new();
        for one in &self.waiting {
            *counts.entry(&one.user_id).or_default() += 1;
        }
        let heaviest = counts.into_iter().max_by_key(|(_, count)| *count);
        let Some((heaviest, _)) = heaviest.filter(|(_, count)| *count > queued + 1) else {
            return false;
        };
        let theirs = self.waiting.iter().enumerate();
        let theirs = theirs.filter(|(_, one)| one.user_id == *heaviest);
        let newest = theirs.max_by_key(|(_, one)| one.number).map(|(at, _)| at);
        let evicted = newest.map(|at| self.waiting.remove(at));
        evicted.is_some_and(|one| {
            one.place.send_replace(Place::Evicted);
            true
        })
    }

    /// Counts one more active run of a user.
    fn serve(&mut self, number: u64, user_id: &UserId, wants: Wants) {
        self.next += 1;
        let user = self.users.entry(user_id.clone()).or_default();
        user.carried.insert(number, wants);
        user.served = self.next;
    }

    /// How many runs and leases a user has, and how many leases: what this shim carries, and what
    /// nodes report beside it.
    fn held(&self, user_id: &UserId) -> (u32, u32) {
        let carried = self.users.get(user_id).map(|user| &user.carried);
        let carried = || carried.into_iter().flat_map(HashMap::values);
        let is_carried = |id: RunId| carried().any(|wants| wants.run_id() == Some(id));
        let mut leases = carried().filter(|wants| **wants == Wants::Lease).count();
        let mut all = carried().count();
        for (run_id, is_lease) in self.view.held(user_id) {
            leases += usize::from(is_lease);
            all += usize::from(!is_carried(run_id));
        }
        [all, leases]
            .map(|count| u32::try_from(count).unwrap_or(u32::MAX))
            .into()
    }

    /// Sends every waiting run its place.
    fn order(&mut self) {
        // Forgets users without active or waiting runs.
        let Self { waiting, users, .. } = self;
        users.retain(|user_id, user| {
            !user.carried.is_empty() || waiting.iter().any(|one| one.user_id == *user_id)
        });
        waiting.sort_by_key(|one| one.number);
        // A user's second run comes after all first ones of users with as many runs.
        let mut counted: HashMap<&UserId, (u32, u32)> = HashMap::new();
        let mut keys: HashMap<u64, Key> = HashMap::new();
        for one in &self.waiting {
            let (held, leases) = counted
                .entry(&one.user_id)
                .or_insert_with(|| self.held(&one.user_id));
            let key = Key {
                held: *held,
                leases: *leases,
                served: self.users.get(&one.user_id).map_or(0, |user| user.served),
            };
            *held += 1;
            *leases += u32::from(one.wants == Wants::Lease);
            keys.insert(one.number, key);
        }
        let PerUser {
            running, leases, ..
        } = self.per_user;
        let waiting = &mut self.waiting;
        waiting.sort_by_key(|one| {
            let key = &keys[&one.number];
            (key.held, key.served, one.number)
        });
        let mut ahead: HashMap<&'static str, usize> = HashMap::new();
        let mut taken: HashMap<&'static str, bool> = HashMap::new();
        for one in waiting.iter() {
            let key = &keys[&one.number];
            let may_run = running.is_none_or(|most| key.held < most)
                && (one.wants != Wants::Lease || key.leases < leases);
            let behind = ahead.entry(one.provider).or_default();
            let place = if !may_run {
                Place::Held(*behind)
            } else if std::mem::replace(taken.entry(one.provider).or_default(), true) {
                Place::Behind(*behind)
            } else {
                Place::Next
            };
            *behind += 1;
            one.place
                .send_if_modified(|now| std::mem::replace(now, place) != place);
        }
    }
}

/// What decides about the place of a run.
struct Key {
    /// What its user has, with what waits before it.
    held: u32,
    leases: u32,
    served: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn enter(queue: &Queue, provider: &'static str, user_id: &str) -> Result<Ticket, Full> {
        queue.enter(provider, &user_id.into(), Wants::Run(RunId::now()))
    }

    fn queue(running: Option<u32>, queued: u32) -> Queue {
        let per_user = PerUser {
            running,
            leases: 2,
            queued,
        };
        Queue::new(per_user, View::new())
    }

    fn place(ticket: &Ticket) -> Place {
        *ticket.place.borrow()
    }

    #[test]
    fn users_take_turns_however_many_runs_each_brings() {
        let queue = queue(None, 10);
        let many: Vec<Ticket> = (0..3)
            .map(|_| enter(&queue, "openai", "alice").unwrap())
            .collect();
        let one = enter(&queue, "openai", "bob").unwrap();
        let other = enter(&queue, "google", "carol").unwrap();
        assert_eq!(place(&many[0]), Place::Next);
        assert_eq!(place(&one), Place::Behind(1));
        assert_eq!(place(&many[1]), Place::Behind(2));
        assert_eq!(place(&other), Place::Next, "each provider has its own");

        let mut many = many.into_iter();
        let running = many.next().unwrap().served();
        assert_eq!(place(&one), Place::Next, "alice has a run, bob has none");
        let bobs = one.served();
        let second = many.next().unwrap();
        assert_eq!(place(&second), Place::Next);
        drop(running);
        drop(bobs);
        assert_eq!(place(&second), Place::Next);
    }

    #[test]
    fn a_run_with_a_lease_passes_a_full_queue_and_counts() {
        let queue = queue(Some(1), 1);
        let waits = enter(&queue, "openai", "alice").unwrap();
        enter(&queue, "openai", "alice").unwrap_err();
        assert_eq!(place(&waits), Place::Next);
        let running = queue.pass("openai", &"alice".into(), RunId::now());
        assert_eq!(place(&waits), Place::Held(0));
        drop(running);
        assert_eq!(place(&waits), Place::Next);
    }

    #[test]
    fn a_user_at_the_limit_waits_and_holds_nobody_up() {
        let queue = queue(Some(1), 2);
        let running = enter(&queue, "openai", "alice").unwrap().served();
        let waits = enter(&queue, "openai", "alice").unwrap();
        let _third = enter(&queue, "openai", "alice").unwrap();
        assert_eq!(place(&waits), Place::Held(0));
        let refused = enter(&queue, "openai", "alice").unwrap_err().to_string();
        assert_eq!(
            refused,
            "user `alice` has 2 runs waiting already; this shim allows no more"
        );
        let bob = enter(&queue, "openai", "bob").unwrap();
        assert_eq!(place(&bob), Place::Next);
        drop(bob);
        drop(running);
        assert_eq!(place(&waits), Place::Next);
    }

    #[test]
    fn leases_are_counted_apart_and_with_runs() {
        let queue = queue(Some(3), 10);
        let alice = UserId::from("alice");
        let lease = || queue.enter("openai", &alice, Wants::Lease).unwrap();
        let (one, two) = (lease().served(), lease().served());
        let third = lease();
        assert_eq!(place(&third), Place::Held(0), "two leases are allowed");
        let run = enter(&queue, "openai", "alice").unwrap().served();
        let waits = enter(&queue, "openai", "alice").unwrap();
        assert_eq!(place(&waits), Place::Held(1), "three of all are allowed");
        drop(one);
        assert_eq!(place(&third), Place::Next);
        drop((two, run));
    }

    #[tokio::test]
    async fn one_user_cannot_fill_the_queue() {
        let queue = queue(None, 2000);
        let mut many: Vec<Ticket> = (0..MAX_WAITING)
            .map(|_| enter(&queue, "openai", "alice").unwrap())
            .collect();
        assert_eq!(enter(&queue, "openai", "alice").unwrap_err(), Full::Shim);
        let bob = enter(&queue, "openai", "bob").unwrap();
        assert_eq!(place(&bob), Place::Behind(1));
        let evicted = many.last_mut().unwrap().turn().await.unwrap_err();
        assert!(matches!(evicted, Full::Evicted { .. }), "{evicted}");
        many[0].turn().await.unwrap();
        drop(many.pop());
        assert_eq!(queue.lock().waiting.len(), MAX_WAITING);
    }

    proptest! {
        /// Whatever runs come, are served, give up or end: exactly one waiting run of each
        /// provider is next, and in the end no user is remembered.
        #[test]
        fn somebody_is_always_next(steps in prop::collection::vec((0u8..4, 0usize..3, 0usize..9), 0..80)) {
            let queue = queue(None, 1000);
            let (mut waiting, mut running) = (Vec::<Ticket>::new(), Vec::<Running>::new());
            for (step, user, index) in steps {
                match step {
                    0 => waiting.push(enter(&queue, "openai", ["a", "b", "c"][user]).unwrap()),
                    1 if !waiting.is_empty() => {
                        let next = waiting.iter().position(|one| place(one) == Place::Next).unwrap();
                        running.push(waiting.remove(next).served());
                    }
                    2 if !waiting.is_empty() => drop(waiting.remove(index % waiting.len())),
                    3 if !running.is_empty() => drop(running.remove(index % running.len())),
                    _ => {}
                }
                let next = waiting.iter().filter(|one| place(one) == Place::Next).count();
                prop_assert_eq!(next, usize::from(!waiting.is_empty()));
            }
            drop((waiting, running));
            let inner = queue.lock();
            prop_assert!(inner.waiting.is_empty() && inner.users.is_empty());
        }
    }
}
