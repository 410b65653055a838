//! Runs that wait for a slot, in an order that is fair between users. The user with the fewest
//! runs comes first, then the user who was served longest ago, then the run that came first.
//! Each shim has its own queues, and counts only the runs that it carries itself.

use std::{collections::HashMap, sync::Arc};

use parking_lot::{Mutex, MutexGuard};
use polydev_proto::id::UserId;
use tokio::sync::watch;

/// Runs that may wait in one shim.
pub const MAX_WAITING: usize = 1000;

/// Limits for each user of a shim.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct PerUser {
    /// Active runs of one user that this shim allows; further runs wait. A run with a lease does
    /// not wait, but counts. [default: no limit]
    #[arg(long = "user-running", value_name = "RUNS", value_parser = clap::value_parser!(u32).range(1..))]
    pub running: Option<u32>,
    /// Waiting runs of one user that this shim allows; further ones are refused. [default: no
    /// limit]
    #[arg(long = "user-queued", value_name = "RUNS")]
    pub queued: Option<u32>,
}

/// A run is refused because too many runs wait.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    #[error("{MAX_WAITING} runs are waiting already; this shim allows no more")]
    Shim,
    #[error("user `{user_id}` has {most} runs waiting already; this shim allows no more")]
    User { user_id: UserId, most: u32 },
}

/// The queues of a shim; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Queue {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    per_user: PerUser,
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
    place: watch::Sender<Place>,
}

#[derive(Debug, Default)]
struct User {
    running: u32,
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
}

/// A run's place in the queue. Drop gives it up.
#[derive(Debug)]
pub struct Ticket {
    queue: Queue,
    number: u64,
    provider: &'static str,
    user_id: UserId,
    pub place: watch::Receiver<Place>,
}

/// An active run, which ends when this is dropped.
#[derive(Debug)]
pub struct Running {
    queue: Queue,
    number: u64,
    provider: &'static str,
    user_id: UserId,
}

impl Queue {
    #[must_use]
    pub fn new(per_user: PerUser) -> Self {
        let inner = Inner {
            per_user,
            ..Inner::default()
        };
        Self {
            inner: Arc::new(inner.into()),
        }
    }

    /// Puts a run into the queue.
    ///
    /// # Errors
    /// [`Full`]
    pub fn enter(&self, provider: &'static str, user_id: &UserId) -> Result<Ticket, Full> {
        let mut inner = self.lock();
        if inner.waiting.len() >= MAX_WAITING {
            return Err(Full::Shim);
        }
        let queued = inner.waiting.iter().filter(|one| one.user_id == *user_id);
        if let Some(most) = inner.per_user.queued
            && queued.count() >= most as usize
        {
            let user_id = user_id.clone();
            return Err(Full::User { user_id, most });
        }
        inner.next += 1;
        let number = inner.next;
        drop(inner);
        Ok(self.insert(number, provider, user_id.clone()))
    }

    /// Counts a run that does not wait, because its lease has waited.
    #[must_use]
    pub fn pass(&self, provider: &'static str, user_id: &UserId) -> Running {
        let mut inner = self.lock();
        inner.next += 1;
        let number = inner.next;
        inner.serve(user_id);
        inner.order();
        drop(inner);
        Running {
            queue: self.clone(),
            number,
            provider,
            user_id: user_id.clone(),
        }
    }

    fn insert(&self, number: u64, provider: &'static str, user_id: UserId) -> Ticket {
        let (place, receiver) = watch::channel(Place::Behind(usize::MAX));
        let mut inner = self.lock();
        inner.waiting.push(Waiting {
            number,
            provider,
            user_id: user_id.clone(),
            place,
        });
        inner.order();
        Ticket {
            queue: self.clone(),
            number,
            provider,
            user_id,
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
    /// # Cancel safety
    /// Loses nothing.
    pub async fn turn(&mut self) {
        // The sender lives as long as the ticket.
        let _next = self.place.wait_for(|place| *place == Place::Next).await;
    }

    /// Takes the run out of the queue: it has a slot to claim. From now on it counts as an active
    /// run of its user. If it does not get the slot, [`Running::back`] puts it back.
    #[must_use]
    pub fn served(self) -> Running {
        self.queue.lock().serve(&self.user_id);
        Running {
            queue: self.queue.clone(),
            number: self.number,
            provider: self.provider,
            user_id: self.user_id.clone(),
        }
    }
}

impl Running {
    /// Puts the run back at its place in the queue: it did not get its slot.
    #[must_use]
    pub fn back(self) -> Ticket {
        self.queue
            .insert(self.number, self.provider, self.user_id.clone())
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
            user.running = user.running.saturating_sub(1);
        }
        inner.order();
    }
}

impl Inner {
    /// Counts one more active run of a user.
    fn serve(&mut self, user_id: &UserId) {
        self.next += 1;
        let user = self.users.entry(user_id.clone()).or_default();
        user.running += 1;
        user.served = self.next;
    }

    /// Sends every waiting run its place.
    fn order(&mut self) {
        let Self {
            per_user,
            waiting,
            users,
            ..
        } = self;
        // Forgets users without active or waiting runs.
        users.retain(|user_id, user| {
            user.running > 0 || waiting.iter().any(|one| one.user_id == *user_id)
        });
        waiting.sort_by_key(|one| one.number);
        // A user's second run comes after all first ones of users with as many runs.
        let mut counted: HashMap<UserId, u32> = HashMap::new();
        let mut keys: HashMap<u64, (u32, u64)> = HashMap::new();
        for one in waiting.iter() {
            let user = users.get(&one.user_id);
            let before = counted.entry(one.user_id.clone()).or_default();
            let running = user.map_or(0, |user| user.running) + *before;
            *before += 1;
            keys.insert(one.number, (running, user.map_or(0, |user| user.served)));
        }
        waiting.sort_by_key(|one| (keys[&one.number], one.number));
        let mut ahead: HashMap<&'static str, usize> = HashMap::new();
        let mut taken: HashMap<&'static str, bool> = HashMap::new();
        for one in waiting.iter() {
            let (running, _) = keys[&one.number];
            let may_run = per_user.running.is_none_or(|most| running < most);
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn enter(queue: &Queue, provider: &'static str, user_id: &str) -> Result<Ticket, Full> {
        queue.enter(provider, &user_id.into())
    }

    fn place(ticket: &Ticket) -> Place {
        *ticket.place.borrow()
    }

    #[test]
    fn users_take_turns_however_many_runs_each_brings() {
        let queue = Queue::default();
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
        let queue = Queue::new(PerUser {
            running: Some(1),
            queued: Some(1),
        });
        let waits = enter(&queue, "openai", "alice").unwrap();
        enter(&queue, "openai", "alice").unwrap_err();
        assert_eq!(place(&waits), Place::Next);
        let running = queue.pass("openai", &"alice".into());
        assert_eq!(place(&waits), Place::Held(0));
        drop(running);
        assert_eq!(place(&waits), Place::Next);
    }

    #[test]
    fn a_user_at_the_limit_waits_and_holds_nobody_up() {
        let queue = Queue::new(PerUser {
            running: Some(1),
            queued: Some(2),
        });
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

    proptest! {
        /// Whatever runs come, are served, give up or end: exactly one waiting run of each
        /// provider is next, and in the end no user is remembered.
        #[test]
        fn somebody_is_always_next(steps in prop::collection::vec((0u8..4, 0usize..3, 0usize..9), 0..80)) {
            let queue = Queue::default();
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
