//! Runs that wait for a slot, in an order that is fair between users. The user with the fewest
//! runs comes first, then the user who was served longest ago, then the run that came first.
//! Each shim has its own queues. A user's runs are counted on all nodes, whoever started them: a
//! shim hears of another shim's within a second.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use polydev_proto::id::{RunId, UserId};
use tokio::{sync::watch, time::interval};

use crate::pool::{Candidate, View};

/// Runs that may wait in one shim.
pub const MAX_WAITING: usize = 1000;
/// How often the shim looks at what lost nodes had.
const FORGET_INTERVAL: Duration = Duration::from_secs(30);

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
        "the queue is full, and user `{user_id}` has most of it: this run was removed for a run of \
         another user"
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
    /// Somebody must approve it first.
    needs_approval: bool,
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
    /// The run's user has as many active runs as allowed, or nobody has approved the run yet. This
    /// number of runs are ahead.
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

    /// How many wait for a slot, by provider; those without any are missing. Runs that nobody has
    /// approved do not count.
    #[must_use]
    pub fn waiting(&self) -> HashMap<&'static str, u64> {
        let mut counts = HashMap::new();
        for one in self.lock().waiting.iter().filter(|one| !one.needs_approval) {
            *counts.entry(one.provider).or_default() += 1;
        }
        counts
    }

    /// Lets waiting runs go on when their users' runs end elsewhere. Never returns.
    pub async fn keep(&self) {
        let mut changes = self.view.changes();
        let mut ticks = interval(FORGET_INTERVAL);
        loop {
            tokio::select! {
                changed = changes.changed() => changed.expect("the sender is in `self`"),
                _ = ticks.tick() => self.view.forget_held(),
            }
            self.lock().order_again();
        }
    }

    /// Puts a run into the queue. If the queue is full, a run of the user with most waiting ones
    /// makes room, unless it is this user. A run that needs an approval keeps its place until
    /// [`Ticket::approved`], and others pass it.
    ///
    /// # Errors
    /// [`Full`]
    pub fn enter(
        &self,
        provider: &'static str,
        user_id: &UserId,
        wants: Wants,
        needs_approval: bool,
    ) -> Result<Ticket, Full> {
        let mut inner = self.lock();
        let queued = inner.queued(user_id, needs_approval);
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
        Ok(self.insert(
            inner,
            number,
            (provider, wants),
            user_id.clone(),
            needs_approval,
        ))
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

    fn insert(
        &self,
        mut inner: MutexGuard<'_, Inner>,
        number: u64,
        (provider, wants): (&'static str, Wants),
        user_id: UserId,
        needs_approval: bool,
    ) -> Ticket {
        let (place, receiver) = watch::channel(Place::Behind(usize::MAX));
        inner.waiting.push(Waiting {
            number,
            provider,
            user_id: user_id.clone(),
            wants,
            needs_approval,
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
    /// Waits until the next idle slot is for this run, and for that slot.
    ///
    /// # Errors
    /// [`Full::Evicted`]
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn slot(&mut self) -> Result<Candidate, Full> {
        loop {
            self.turn().await?;
            let (view, provider) = (self.queue.view.clone(), self.provider);
            tokio::select! {
                slot = view.idle_slot(provider) => return Ok(slot),
                // Its user has a run more, or another run is next.
                changed = self.place.changed() => if changed.is_err() {
                    return Err(self.evicted());
                }
            }
        }
    }

    /// Somebody has approved the run: from now on it has its turn.
    pub fn approved(&self) {
        let mut inner = self.queue.lock();
        let mut waiting = inner.waiting.iter_mut();
        if let Some(one) = waiting.find(|one| one.number == self.number) {
            one.needs_approval = false;
        }
        inner.order();
    }

    /// Returns when a run of another user has taken the place.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn lost(&mut self) -> Full {
        let is_evicted = |place: &Place| *place == Place::Evicted;
        let _sender_is_gone = self.place.wait_for(is_evicted).await.map(drop);
        self.evicted()
    }

    async fn turn(&mut self) -> Result<(), Full> {
        let is_over = |place: &Place| matches!(place, Place::Next | Place::Evicted);
        // The sender lives as long as the run waits. It goes when the run is evicted.
        let place = self.place.wait_for(is_over).await.map(|place| *place);
        match place {
            Ok(Place::Next) => Ok(()),
            _ => Err(self.evicted()),
        }
    }

    fn evicted(&self) -> Full {
        Full::Evicted {
            user_id: self.user_id.clone(),
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
        let (queue, user_id) = (&self.queue, self.user_id.clone());
        let what = (self.provider, self.wants);
        queue.insert(queue.lock(), self.number, what, user_id, false)
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
    /// Runs that nobody has approved are counted apart: they keep no other run from waiting.
    fn queued(&self, user_id: &UserId, needs_approval: bool) -> usize {
        let is_alike =
            |one: &&Waiting| one.user_id == *user_id && one.needs_approval == needs_approval;
        self.waiting.iter().filter(is_alike).count()
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

    /// Orders the runs again if what nodes have reported could change their places.
    fn order_again(&mut self) {
        let is_lease = |one: &Waiting| one.wants == Wants::Lease;
        let is_limited = self.per_user.running.is_some() || self.waiting.iter().any(is_lease);
        if is_limited && !self.waiting.is_empty() {
            self.order();
        }
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
            *held += u32::from(!one.needs_approval);
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
            let may_run = !one.needs_approval
                && running.is_none_or(|most| key.held < most)
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
mod tests;
