//! Warm slots: allocations that keep an idle container ready and turn it, once, into a run.
//!
//! Read in the order of a slot's life: [`state`] is the pure machine, [`fill`] makes
//! a container unless [`breaker`] says that its image is not worth it, [`adopt`] takes up one
//! that an earlier life of the driver left, [`crate::link`] talks
//! to its init, [`lease`] keeps it for one caller, [`headroom`] says whether the node has room for a run, [`crate::run`] has what
//! is run in it, [`ahead`] makes the next container meanwhile if it is to, [`clear`] removes
//! the old one, and [`keeper`] drives one slot through all of that. [`book`] holds the
//! slots of the node for everyone else.

pub mod adopt;
mod ahead;
pub mod book;
pub mod breaker;
mod claim;
mod clear;
mod fill;
pub mod headroom;
mod keeper;
mod lease;
pub mod state;

pub use fill::Error as FillError;
pub use keeper::Ended;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    config,
    identity::Identity,
    limits::{self, Limits, Usage},
    metrics::Steps,
    run::{Run, book::Occupant, carry::Order},
};
use headroom::Share;
use lease::Lease;
use state::{Event, Life, State};

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
        let container = self.container();
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

    fn try_apply(&self, event: Event) -> Result<(), state::Refused> {
        let life = self.lock();
        let mut next = life.clone();
        next.apply(event, SystemTime::now())?;
        self.step(life, next);
        Ok(())
    }

    /// Takes a step that has been decided, and tells of it.
    fn step(&self, mut life: MutexGuard<'_, Life>, next: Life) {
        self.steps.taken(self, &life, &next);
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
        let mut container = self.container();
        container.limits = Some(filled.limits.clone());
        container.occupant = Some(filled.occupant());
        container.public_key = filled.public_key.clone();
    }

    /// What secrets for its container are sealed to; empty if it has none.
    #[must_use]
    pub fn public_key(&self) -> Bytes {
        self.container().public_key.clone()
    }

    /// Whether that is its container.
    pub(crate) fn has(&self, container: &str) -> bool {
        let occupant = &self.container().occupant;
        occupant
            .as_ref()
            .is_some_and(|occupant| occupant.container == container)
    }

    /// Its container is of no more use: what it used has been used.
    fn let_go(&self) {
        drop(self.leased_share());
        let used = self.usage();
        let mut container = self.container();
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

    fn container(&self) -> MutexGuard<'_, Container> {
        self.container
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lease_lock(&self) -> MutexGuard<'_, Lease> {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_claimed(&self) -> bool {
        matches!(
            self.lock().state(),
            State::Claimed { .. } | State::Draining { run_id: Some(_) }
        )
    }
}
