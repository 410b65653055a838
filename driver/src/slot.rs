//! Warm slots: allocations that keep an idle container ready and use it for one run.
//!
//! Read in the order of a slot's life: [`crate::life`] is the pure state machine, [`fill`]
//! makes a container unless [`breaker`] finds that its image fails too often, [`shelf`]
//! records it and [`adopt`] recovers it after a restart of the driver, [`lease`] keeps it
//! for one caller, [`expected`] waits for the run of a slot on demand, [`claim`] grants it,
//! [`crate::run`] is what runs in it, [`ahead`] makes the next container during the run,
//! [`clear`] removes the old one, and [`keeper`] drives one slot through all these steps.
//! [`book`] holds the node's slots for all others.

pub mod adopt;
pub mod agent;
mod ahead;
pub mod book;
mod boost;
pub mod breaker;
pub(crate) mod claim;
mod clear;
mod expected;
mod fill;
mod keeper;
pub(crate) mod lease;
pub mod shelf;

pub use fill::Error as FillError;
pub use keeper::Ended;

use std::{sync::Arc, time::SystemTime};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use polydev_proto::{broker::Egress, id::SlotId, init};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    config,
    firewall::Guard,
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

/// The slots of a node, and what they share.
#[derive(Debug)]
pub struct Slots {
    pub site: Arc<Site>,
    pub runs: Arc<Runs>,
    pub book: Book,
    /// Idle containers, recorded for the next life of the driver.
    pub idle: Shelf,
    pub headroom: Arc<Headroom>,
    pub breakers: Breakers,
    /// How many containers may be made at the same time: more would slow down the runs.
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

    /// Number of slots in each state.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::zeros();
        for slot in self.book.all().iter().filter(|slot| slot.end().is_none()) {
            let (provider, life) = (slot.config.provider, slot.life());
            counts.add(provider, slot.is_on_demand(), life.state());
        }
        counts
    }

    /// # Errors
    /// [`Refusal::OtherStart`] if the shim saw another start of the driver.
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
    fn live(&self, slot_id: &SlotId) -> Result<Arc<Slot>, Refusal> {
        let slot = self.book.by_slot_id(slot_id);
        slot.ok_or_else(|| Refusal::UnknownSlot {
            slot_id: slot_id.clone(),
        })
    }
}

/// One slot, as seen by all but its keeper.
#[derive(Debug)]
pub struct Slot {
    pub identity: Identity,
    pub config: config::Slot,
    /// Limits of its idle container.
    pub idle: Limits,
    pub started: SystemTime,
    life: Mutex<Life>,
    /// Only a granted claim fills it, and there is one at a time.
    claims: mpsc::Sender<Claim>,
    /// Cancelled when Nomad wants the slot to run.
    wanted: CancellationToken,
    /// Cancelled when the slot should end: no new claim, and an end after the run. Nomad wants
    /// it, or the run of a slot on demand does not come.
    drain: CancellationToken,
    /// Cancelled to end the slot at once, with its run.
    kill: CancellationToken,
    end: watch::Sender<Option<(Ended, SystemTime)>>,
    lease: Mutex<Lease>,
    container: Mutex<Container>,
    steps: Steps,
    changed: watch::Sender<u64>,
}

/// A run on its way to the slot's container, with its share of the node.
#[derive(Debug)]
struct Claim {
    run: Arc<Run>,
    order: Order,
    share: Share,
}

/// Who is in the current container, and the usage of past containers.
#[derive(Debug, Default)]
struct Container {
    limits: Option<Arc<limits::Handle>>,
    occupant: Option<Occupant>,
    public_key: Bytes,
    agent: Option<init::Agent>,
    past: Usage,
}

impl Slot {
    #[must_use]
    pub fn life(&self) -> Life {
        self.lock().clone()
    }

    /// Nomad waits for the slot's end. A recovered slot does nothing before, because Nomad
    /// also recovers tasks that it considers dead, to destroy them.
    pub fn want(&self) {
        self.wanted.cancel();
    }

    /// Allows no further claim; the slot ends after its run, if it has one.
    pub fn drain(&self) {
        self.apply(Event::Drained);
        self.drain.cancel();
    }

    /// Ends the slot now, including its run.
    pub fn kill(&self) {
        self.drain();
        self.kill.cancel();
    }

    /// Whether the slot is for one run only.
    #[must_use]
    pub fn is_on_demand(&self) -> bool {
        self.config.run_id.is_some()
    }

    /// Waits for the slot's end. Cancel safe, for any number of waiters.
    pub async fn ended(&self) -> Ended {
        let mut end = self.end.subscribe();
        match end.wait_for(Option::is_some).await.map(|end| end.clone()) {
            Ok(Some((end, _))) => end,
            // `self` owns the sender, and `wait_for` waits for `Some`.
            Ok(None) | Err(_) => unreachable!("a slot outlives those who wait for it"),
        }
    }

    /// How and when the slot ended, if it has.
    #[must_use]
    pub fn end(&self) -> Option<(Ended, SystemTime)> {
        self.end.borrow().clone()
    }

    /// Total usage of all the slot's containers; totals never decrease.
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

    /// Takes a step that was decided, and publishes it.
    fn step(&self, mut life: MutexGuard<'_, Life>, next: Life) {
        let (provider, on_demand) = (self.config.provider, self.is_on_demand());
        self.steps.taken(provider, on_demand, &life, &next);
        *life = next;
        drop(life);
        self.changed.send_modify(|version| *version += 1);
    }

    /// For events that may no longer matter in the current state, such as a second drain.
    fn apply(&self, event: Event) {
        if let Err(refused) = self.try_apply(event) {
            tracing::debug!(slot = %self.identity.slot_id(), %refused, "slot event ignored");
        }
    }

    /// The slot has a container, which is not yet announced as idle.
    fn hold(&self, filled: &fill::Container) {
        let mut container = self.container.lock();
        container.limits = Some(filled.limits.clone());
        container.occupant = Some(filled.occupant());
        container.public_key = filled.public_key.clone();
        container.agent = filled.agent.clone();
    }

    /// The key to seal secrets for its container with; empty without a container.
    #[must_use]
    pub fn public_key(&self) -> Bytes {
        self.container.lock().public_key.clone()
    }

    /// What init says of the agent that waits in its container. `None` without one.
    #[must_use]
    pub fn agent(&self) -> Option<init::Agent> {
        self.container.lock().agent.clone()
    }

    /// Whether this is its container.
    pub(crate) fn has(&self, container: &str) -> bool {
        let occupant = &self.container.lock().occupant;
        occupant
            .as_ref()
            .is_some_and(|occupant| occupant.container == container)
    }

    /// Its container is no longer needed; adds up what it used.
    fn let_go(&self) {
        drop(self.leased_share());
        let used = self.usage();
        let mut container = self.container.lock();
        container.occupant = None;
        container.public_key.clear();
        container.agent = None;
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

    /// What its containers may reach beside their model, as shims are told; `None` with a network
    /// interface.
    #[must_use]
    pub fn told_egress(&self) -> Option<Egress> {
        let listed = self.config.egress.listed();
        listed.map(|allow| Egress {
            allow: allow.to_vec(),
        })
    }

    /// Whether its containers have a network interface.
    #[must_use]
    pub fn has_network(&self) -> bool {
        self.config.egress.listed().is_none()
    }

    /// Why nothing may begin to run in its containers now; `None` if it may.
    fn unguarded(&self, site: &Site) -> Option<String> {
        match &*site.guard.borrow() {
            Guard::Closed { reason } if self.has_network() => Some(reason.clone()),
            _ => None,
        }
    }

    /// Waits until its containers may run.
    ///
    /// # Cancel safety
    /// Loses nothing.
    async fn guarded(&self, site: &Site) {
        let may_run = |guard: &Guard| !self.has_network() || *guard == Guard::Open;
        // The sender lives as long as the site.
        let mut guard = site.guard.subscribe();
        drop(guard.wait_for(may_run).await);
    }

    fn lock(&self) -> MutexGuard<'_, Life> {
        self.life.lock()
    }

    fn is_claimed(&self) -> bool {
        matches!(
            self.lock().state(),
            State::Claimed { .. } | State::Draining { holder: Some(_) }
        )
    }
}
