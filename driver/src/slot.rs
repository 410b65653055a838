//! Warm slots: allocations that keep an idle container ready and turn it, once, into a run.
//!
//! Read in the order of a slot's life: [`crate::life`] is the pure machine, [`fill`] makes
//! a container unless [`breaker`] says that its image fails too often, [`shelf`] records it and
//! [`adopt`] takes it up again after a restart of the driver, [`lease`] keeps it for one caller,
//! [`claim`] grants it, [`crate::run`] has what is run in it, [`ahead`] makes the next container
//! during the run, [`clear`] removes the old one, and [`keeper`] drives one slot through all of
//! that. [`book`] holds the slots of the node for everyone else.

pub mod adopt;
mod ahead;
pub mod book;
pub mod breaker;
pub(crate) mod claim;
mod clear;
mod fill;
mod keeper;
pub(crate) mod lease;
pub mod shelf;

pub use fill::Error as FillError;
pub use keeper::Ended;

use std::{sync::Arc, time::SystemTime};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    config,
    headroom::{Headroom, Share},
    identity::Identity,
    life::{self, Event, Life, State},
    limits::{self, Limits, Usage},
    link::Occupant,
    metrics::{Counts, Steps},
    run::{Run, book::Runs, carry::Order, claim::Refusal},
    site::Site,
};
use book::Book;
use breaker::Breakers;
use lease::Lease;
use shelf::Shelf;

/// The slots of a node, with what they share.
#[derive(Debug)]
pub struct Slots {
    pub site: Arc<Site>,
    pub runs: Arc<Runs>,
    pub book: Book,
    /// Idle containers, as the next life of the driver will find them.
    pub idle: Shelf,
    pub headroom: Arc<Headroom>,
    pub breakers: Breakers,
    /// Containers that may be made at the same time: more would slow the runs.
    fills: Semaphore,
    steps: Steps,
}

impl Slots {
    #[must_use]
    pub fn new(site: Arc<Site>, runs: Arc<Runs>, idle: Shelf, steps: Steps) -> Self {
        let cores = usize::try_from(site.compute.cores).unwrap_or(0).max(1);
        Self {
            book: Book::new(),
            headroom: Headroom::new(site.config.run_headroom),
            breakers: Breakers::default(),
            fills: Semaphore::new(2 * cores),
            site,
            runs,
            idle,
            steps,
        }
    }

    /// How many slots are in each state.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::zeros();
        for slot in self.book.all().iter().filter(|slot| slot.end().is_none()) {
            let (provider, life) = (&slot.config.provider, slot.life());
            counts.add(provider, slot.is_on_demand(), life.state());
        }
        counts
    }

    /// # Errors
    /// [`Refusal::OtherStart`] if a shim has seen another start of the driver.
    fn check_start(&self, given: &str) -> Result<(), Refusal> {
        let actual = &self.site.start_id;
        if given == actual {
            return Ok(());
        }
        Err(Refusal::OtherStart {
            given: given.to_owned(),
            actual: actual.clone(),
        })
    }

    /// # Errors
    /// [`Refusal::UnknownSlot`]
    fn live(&self, slot_id: &str) -> Result<Arc<Slot>, Refusal> {
        let slot = self.book.by_slot_id(slot_id);
        slot.ok_or_else(|| Refusal::UnknownSlot {
            slot_id: slot_id.to_owned(),
        })
    }
}

/// One slot, as everybody but its keeper sees it.
#[derive(Debug)]
pub struct Slot {
    pub identity: Identity,
    pub config: config::Slot,
    /// What its idle container may use.
    pub idle: Limits,
    pub started: SystemTime,
    life: Mutex<Life>,
    /// Filled by a granted claim only, of which there is one at a time.
    claims: mpsc::Sender<Claim>,
    /// Nomad means the slot to be.
    wanted: CancellationToken,
    /// Nomad wants the slot gone: no new claim, and its end when the run has ended.
    drain: CancellationToken,
    /// Nothing of the slot may be left, run or not.
    kill: CancellationToken,
    end: watch::Sender<Option<Ended>>,
    lease: Mutex<Lease>,
    container: Mutex<Container>,
    steps: Steps,
    changed: watch::Sender<u64>,
}

/// A run on its way to the slot's container, with what it took of the node.
#[derive(Debug)]
struct Claim {
    run: Arc<Run>,
    order: Order,
    share: Share,
}

/// Of the slot's containers: who the present one is, and the use of the past ones.
#[derive(Debug, Default)]
struct Container {
    limits: Option<Arc<limits::Handle>>,
    occupant: Option<Occupant>,
    public_key: Bytes,
    past: Usage,
}

impl Slot {
    #[must_use]
    pub fn life(&self) -> Life {
        self.lock().clone()
    }

    /// Nomad waits for the slot's end. A slot that it has recovered does nothing before: Nomad
    /// recovers tasks that are dead to it as well, to destroy them.
    pub fn want(&self) {
        self.wanted.cancel();
    }

    /// No further claim; the slot ends when its run, if it has one, has ended.
    pub fn drain(&self) {
        self.apply(Event::Drained);
        self.drain.cancel();
    }

    /// Ends the slot now, with its run.
    pub fn kill(&self) {
        self.drain();
        self.kill.cancel();
    }

    /// Whether it is for one run only.
    #[must_use]
    pub fn is_on_demand(&self) -> bool {
        self.config.run_id.is_some()
    }

    /// How the slot ended, as soon as it has. Cancel safe, for any number of waiters.
    pub async fn ended(&self) -> Ended {
        let mut end = self.end.subscribe();
        match end.wait_for(Option::is_some).await.map(|end| end.clone()) {
            Ok(Some(end)) => end,
            // The sender is in `self`, and `wait_for` asks for `Some`.
            Ok(None) | Err(_) => unreachable!("a slot outlives those who wait for it"),
        }
    }

    /// How the slot ended, if it has.
    #[must_use]
    pub fn end(&self) -> Option<Ended> {
        self.end.borrow().clone()
    }

    /// What all containers of the slot have used; never goes down in what adds up.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let container = self.container.lock();
        let now = container
            .limits
            .as_ref()
            .map(|limits| limits.usage())
            .unwrap_or_default();
        Usage {
            cpu: container.past.cpu + now.cpu,
            cpu_user: container.past.cpu_user + now.cpu_user,
            cpu_system: container.past.cpu_system + now.cpu_system,
            throttled_periods: container.past.throttled_periods + now.throttled_periods,
            throttled: container.past.throttled + now.throttled,
            ..now
        }
    }

    fn try_apply(&self, event: Event) -> Result<(), life::Refused> {
        let life = self.lock();
        let mut next = life.clone();
        next.apply(event, SystemTime::now())?;
        self.step(life, next);
        Ok(())
    }

    /// Takes a step that has been decided, and tells of it.
    fn step(&self, mut life: MutexGuard<'_, Life>, next: Life) {
        let (provider, on_demand) = (&self.config.provider, self.is_on_demand());
        self.steps.taken(provider, on_demand, &life, &next);
        *life = next;
        drop(life);
        self.changed.send_modify(|version| *version += 1);
    }

    /// For events that the present state may make meaningless, such as a second drain.
    fn apply(&self, event: Event) {
        if let Err(refused) = self.try_apply(event) {
            tracing::debug!(slot = self.identity.slot_id(), %refused, "slot event ignored");
        }
    }

    /// The slot has a container, which is not told to be idle yet.
    fn hold(&self, filled: &fill::Container) {
        let mut container = self.container.lock();
        container.limits = Some(filled.limits.clone());
        container.occupant = Some(filled.occupant());
        container.public_key = filled.public_key.clone();
    }

    /// What secrets for its container are sealed to; empty if it has none.
    #[must_use]
    pub fn public_key(&self) -> Bytes {
        self.container.lock().public_key.clone()
    }

    /// Whether that is its container.
    pub(crate) fn has(&self, container: &str) -> bool {
        let occupant = &self.container.lock().occupant;
        occupant
            .as_ref()
            .is_some_and(|occupant| occupant.container == container)
    }

    /// Its container is of no more use: what it used has been used.
    fn let_go(&self) {
        drop(self.leased_share());
        let used = self.usage();
        let mut container = self.container.lock();
        container.occupant = None;
        container.public_key.clear();
        if container.limits.take().is_some() {
            container.past = Usage {
                rss: 0,
                cache: 0,
                swap: 0,
                memory: 0,
                memory_max: 0,
                ..used
            };
        }
    }

    fn lock(&self) -> MutexGuard<'_, Life> {
        self.life.lock()
    }

    fn is_claimed(&self) -> bool {
        matches!(
            self.lock().state(),
            State::Claimed { .. } | State::Draining { run_id: Some(_) }
        )
    }
}
