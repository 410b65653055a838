//! The states of a slot and all transitions between them. Pure: callers pass the time.
//!
//! ```text
//!            +---------------- Recycled ----------------+
//!            v                                          |
//!         Warming <-Held,Warmed-> Idle --Claimed--> Claimed --RunEnded--> Recycling
//!                              | |                ^                   ^ ^
//!                              | +--Leased--> Leased ---LeaseEnded----+ |
//!                              +------------------+-------Died---------+
//!                              +-------------------------Renewed-------+
//!   any but Failed --Drained--> Draining          Warming, Recycling --GivenUp--> Failed
//! ```
//!
//! A slot on demand serves one run and has one container: a step to `Recycling` leads to
//! `Draining` instead.
//!
//! A lease reserves a pool's slot for one run of one user.

use std::time::SystemTime;

use polydev_proto::id::{Generation, RunId, UserId};

/// The state of a slot.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum State {
    /// A container is starting.
    Warming,
    /// A container waits for a claim.
    Idle,
    /// A container waits for the claim of one particular run.
    Leased { holder: Holder, until: SystemTime },
    /// The container has a run.
    Claimed { holder: Holder },
    /// The remains of the container are being ended.
    Recycling,
    /// The slot leaves the pool, after its run if it has one. Final.
    Draining { holder: Option<Holder> },
    /// Given up. Final.
    Failed,
}

/// What has a slot or a lease of it: a run of a user.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Holder {
    pub run_id: RunId,
    pub user_id: UserId,
}

impl State {
    /// All names that [`State::name`] returns.
    pub const NAMES: [&str; 7] = [
        "warming",
        "idle",
        "leased",
        "claimed",
        "recycling",
        "draining",
        "failed",
    ];

    /// The name in the API, logs and metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Warming => "warming",
            Self::Idle => "idle",
            Self::Leased { .. } => "leased",
            Self::Claimed { .. } => "claimed",
            Self::Recycling => "recycling",
            Self::Draining { .. } => "draining",
            Self::Failed => "failed",
        }
    }
}

/// An event in a slot's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The driver does not try to make a container for now, or the one that is ready must not
    /// run anything for now.
    Held { reason: String },
    /// The container is ready.
    Warmed,
    /// A shim claims the container that it saw.
    Claimed {
        generation: Generation,
        run_id: RunId,
        user_id: UserId,
    },
    /// A shim reserves the container that it saw for one run.
    Leased {
        generation: Generation,
        run_id: RunId,
        user_id: UserId,
        until: SystemTime,
    },
    /// The run that the slot is leased for will not come.
    LeaseEnded,
    /// The slot's run has ended.
    RunEnded,
    /// The idle container is gone.
    Died { reason: String },
    /// The idle container has waited for long, and another one takes its place.
    Renewed,
    /// Nothing runs in the old container any longer, and the next one is being made.
    Recycled,
    /// Nomad stops the allocation, or the run of a slot on demand does not come.
    Drained,
    /// Refilling the slot failed too often, or its first filling failed.
    GivenUp { reason: String },
}

impl Event {
    /// All names that [`Event::name`] returns.
    pub const NAMES: [&str; 11] = [
        "held",
        "warmed",
        "claimed",
        "leased",
        "lease_ended",
        "run_ended",
        "died",
        "renewed",
        "recycled",
        "drained",
        "given_up",
    ];

    /// The name in the API, logs and metrics, where it is the cause of a step.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Held { .. } => "held",
            Self::Warmed => "warmed",
            Self::Claimed { .. } => "claimed",
            Self::Leased { .. } => "leased",
            Self::LeaseEnded => "lease_ended",
            Self::RunEnded => "run_ended",
            Self::Died { .. } => "died",
            Self::Renewed => "renewed",
            Self::Recycled => "recycled",
            Self::Drained => "drained",
            Self::GivenUp { .. } => "given_up",
        }
    }
}

/// The event does not fit the state; the state is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the slot is {} at generation {generation}{}", state.name(), if *on_demand { ", for one run only" } else { "" })]
pub struct Refused {
    pub state: State,
    pub generation: Generation,
    pub on_demand: bool,
}

/// A slot's state and its details.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Life {
    state: State,
    /// Number of the slot's current container, from 1.
    generation: Generation,
    /// The only run that may use the slot; `None` for a slot of a pool.
    for_run: Option<RunId>,
    cause: &'static str,
    reason: String,
    since: SystemTime,
}

impl Life {
    /// A slot whose first container is number `generation`.
    #[must_use]
    pub fn new(generation: Generation, for_run: Option<RunId>, now: SystemTime) -> Self {
        Self {
            state: State::Warming,
            generation,
            for_run,
            cause: "started",
            reason: String::new(),
            since: now,
        }
    }

    /// The slot's state after a restart of its driver, with the run that is still in it.
    #[must_use]
    pub fn resumed(self, holder: Holder, generation: Generation, since: SystemTime) -> Self {
        Self {
            state: State::Claimed { holder },
            generation,
            cause: "recovered",
            since,
            ..self
        }
    }

    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// What led to this state: the name of an [`Event`], `started` or `recovered`.
    #[must_use]
    pub fn cause(&self) -> &'static str {
        self.cause
    }

    /// Why the slot is in this state, for people; often empty.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    #[must_use]
    pub fn since(&self) -> SystemTime {
        self.since
    }

    /// Applies an event. If the state does not change, [`Life::since`] does not change
    /// either.
    ///
    /// # Errors
    /// [`Refused`] if this state does not allow the event.
    pub fn apply(&mut self, event: Event, now: SystemTime) -> Result<(), Refused> {
        let cause = event.name();
        let (state, reason) = match (&self.state, event) {
            (State::Warming | State::Idle, Event::Held { reason }) => (State::Warming, reason),
            (State::Warming, Event::Warmed) => (State::Idle, String::new()),
            (
                State::Idle,
                Event::Claimed {
                    generation,
                    run_id,
                    user_id,
                },
            ) if generation == self.generation && self.is_for(run_id) => {
                let holder = Holder { run_id, user_id };
                (State::Claimed { holder }, String::new())
            }
            (
                State::Idle,
                Event::Leased {
                    generation,
                    run_id,
                    user_id,
                    until,
                },
            ) if generation == self.generation && self.for_run.is_none() => {
                let holder = Holder { run_id, user_id };
                (State::Leased { holder, until }, String::new())
            }
            (
                State::Leased { holder, .. },
                Event::Claimed {
                    generation,
                    run_id,
                    user_id,
                },
            ) if generation == self.generation
                && (holder.run_id, &holder.user_id) == (run_id, &user_id) =>
            {
                let holder = holder.clone();
                (State::Claimed { holder }, String::new())
            }
            (State::Leased { .. }, Event::LeaseEnded) => (State::Recycling, String::new()),
            (State::Claimed { .. }, Event::RunEnded) => (self.after_container(), String::new()),
            // While its container is held, the slot is warming.
            (State::Warming | State::Idle | State::Leased { .. }, Event::Died { reason }) => {
                (self.after_container(), reason)
            }
            (State::Warming | State::Idle, Event::Renewed) => {
                (self.after_container(), String::new())
            }
            (State::Recycling, Event::Recycled) => {
                self.generation = self.generation.next();
                (State::Warming, std::mem::take(&mut self.reason))
            }
            (State::Draining { holder: Some(_) }, Event::RunEnded) => {
                (State::Draining { holder: None }, String::new())
            }
            (State::Claimed { holder }, Event::Drained) => {
                let holder = Some(holder.clone());
                (State::Draining { holder }, String::new())
            }
            (
                State::Warming | State::Idle | State::Leased { .. } | State::Recycling,
                Event::Drained,
            ) => (State::Draining { holder: None }, String::new()),
            (State::Warming | State::Recycling, Event::GivenUp { reason }) => {
                (State::Failed, reason)
            }
            _ => {
                return Err(Refused {
                    state: self.state.clone(),
                    generation: self.generation,
                    on_demand: self.for_run.is_some(),
                });
            }
        };
        let is_as_before = state.name() == self.state.name();
        *self = Self {
            since: if is_as_before { self.since } else { now },
            state,
            cause,
            reason,
            generation: self.generation,
            for_run: self.for_run.take(),
        };
        Ok(())
    }

    fn is_for(&self, run_id: RunId) -> bool {
        self.for_run.is_none_or(|only| only == run_id)
    }

    fn after_container(&self) -> State {
        match self.for_run {
            None => State::Recycling,
            Some(_) => State::Draining { holder: None },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn run_id(letter: u8) -> RunId {
        RunId::new(SystemTime::UNIX_EPOCH, [letter; 10])
    }

    fn generation() -> impl Strategy<Value = Generation> {
        (1u64..6).prop_map(Generation)
    }

    fn event() -> impl Strategy<Value = Event> {
        let who = || ((0u8..4).prop_map(run_id), "[xy]".prop_map(UserId::from));
        prop_oneof![
            Just(Event::Held {
                reason: "broken".into()
            }),
            Just(Event::Warmed),
            (generation(), who()).prop_map(|(generation, (run_id, user_id))| Event::Claimed {
                generation,
                run_id,
                user_id
            }),
            (generation(), who()).prop_map(|(generation, (run_id, user_id))| Event::Leased {
                generation,
                run_id,
                user_id,
                until: SystemTime::UNIX_EPOCH
            }),
            Just(Event::LeaseEnded),
            Just(Event::RunEnded),
            Just(Event::Died {
                reason: "gone".into()
            }),
            Just(Event::Renewed),
            Just(Event::Recycled),
            Just(Event::Drained),
            Just(Event::GivenUp {
                reason: "broken".into()
            }),
        ]
    }

    proptest! {
        #[test]
        fn a_container_serves_at_most_one_run(
            on_demand in prop::option::of((0u8..3).prop_map(run_id)),
            events in prop::collection::vec(event(), 0..300),
        ) {
            let mut life = Life::new(Generation(1), on_demand, SystemTime::UNIX_EPOCH);
            let mut claimed = HashSet::new();
            for event in events {
                let before = life.clone();
                match life.apply(event.clone(), SystemTime::UNIX_EPOCH) {
                    Ok(()) => {
                        prop_assert!(State::NAMES.contains(&life.state().name()));
                        prop_assert_eq!(life.cause(), event.name());
                        prop_assert!(Event::NAMES.contains(&event.name()));
                        prop_assert!(life.generation() <= before.generation().next());
                        prop_assert!(*before.state() != State::Failed, "Failed is final");
                        let is_new = life.generation() > before.generation();
                        prop_assert_eq!(is_new, event == Event::Recycled);
                        if *life.state() == State::Idle {
                            prop_assert_eq!(before.state(), &State::Warming, "of a new container");
                        }
                        if let State::Claimed { holder } = before.state() {
                            let after = match life.state() {
                                State::Recycling => event == Event::RunEnded,
                                State::Draining { holder: None } => event == Event::RunEnded,
                                State::Draining { holder: Some(still) } => still == holder,
                                _ => false,
                            };
                            prop_assert!(after, "a run is left by its end alone");
                        }
                        if let Event::Claimed { generation, run_id, user_id } = event {
                            if let State::Leased { holder, .. } = before.state() {
                                prop_assert_eq!(holder, &Holder { run_id, user_id });
                            }
                            prop_assert_eq!(generation, life.generation());
                            prop_assert!(on_demand.is_none_or(|only| only == run_id));
                            prop_assert!(claimed.insert(generation), "a second claim");
                        }
                        if let State::Draining { .. } = before.state() {
                            prop_assert!(
                                matches!(life.state(), State::Draining { holder: None }),
                                "Draining is final"
                            );
                        }
                    }
                    Err(_) => prop_assert_eq!(life.state(), before.state()),
                }
            }
            prop_assert!(on_demand.is_none() || life.generation() == Generation(1), "a second container");
        }
    }

    #[test]
    fn a_claim_for_an_older_container_is_refused() {
        let now = SystemTime::UNIX_EPOCH;
        let mut life = Life::new(Generation(1), None, now);
        let claim = |generation| Event::Claimed {
            generation: Generation(generation),
            run_id: run_id(1),
            user_id: "alice".into(),
        };
        for event in [
            Event::Warmed,
            claim(1),
            Event::RunEnded,
            Event::Recycled,
            Event::Warmed,
        ] {
            life.apply(event, now).unwrap();
        }
        let refused = life.apply(claim(1), now).unwrap_err();
        assert_eq!(refused.to_string(), "the slot is idle at generation 2");
        life.apply(claim(2), now).unwrap();
    }
}
