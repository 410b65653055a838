//! The claim protocol, checked: every order in which shims, drivers, inits, crashes and lost,
//! late and repeated messages can come, for small numbers of each. What is decided is not
//! modelled: [`Standing`], [`Life`] and [`settle`] are those of the driver and the shim.
//!
//! One run is tried by several shims, the first as a first try, the others as retries. There
//! is no time: a message may be as late as it likes, which is more than `start_by` allows.

use std::{collections::BTreeSet, time::SystemTime};

use polydev_driver::{
    run::{
        Ballot,
        standing::{OnClaim, OnFence, Standing},
    },
    slot::state::{Event, Life, State as SlotState},
};
use polydev_shim::run::fence::{Settled, Told, settle};
use stateright::{Checker, Model, Property};

const RUN: &str = "run";
const NOW: SystemTime = SystemTime::UNIX_EPOCH;

/// How much of everything there may be.
#[derive(Clone, Copy)]
struct Bounds {
    shims: usize,
    drivers: usize,
    /// Of drivers, in all.
    crashes: u8,
    /// Claims and fences of one shim.
    attempts: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    drivers: Vec<Driver>,
    shims: Vec<Shim>,
    /// All that were ever sent: each may arrive at any time, again and again, or never.
    messages: BTreeSet<Message>,
    crashes: u8,
    /// How often init was told to start the run.
    starts: u8,
}

/// A driver with one slot.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Driver {
    up: bool,
    /// Renewed by each start.
    start_id: u8,
    /// What its journal says of the run; with the ballot it was claimed with.
    standing: Option<Standing<()>>,
    claimed: Option<Ballot>,
    slot: Life,
    /// Of the slot's container.
    init: Init,
    /// The try that waits for the answer to its claim.
    answers: Option<Address>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Init {
    Waiting,
    Running,
    Exited,
}

/// Who is answered: a shim, and which of its calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Address {
    shim: usize,
    call: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Claim {
        from: Address,
        driver: usize,
        start_id: u8,
        generation: u64,
        ballot: (u64, u64),
    },
    Fence {
        from: Address,
        driver: usize,
        ballot: (u64, u64),
    },
}

/// What a driver answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Granted,
    Refused { fenced: bool },
    Told { driver: usize, told: Told },
}

/// One try of the run.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Shim {
    ballot: Ballot,
    /// Numbers its calls: an answer to an earlier one is nobody's.
    call: u64,
    does: Does,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Does {
    /// Picks a slot.
    Picks,
    Claims {
        driver: usize,
    },
    /// Asks the driver that gave no clear answer.
    Settles {
        driver: usize,
    },
    /// Asks all.
    Fences {
        told: Vec<Option<Told>>,
    },
    /// It has the run, its own or another try's.
    Attached,
    /// The caller is told that the command did not run.
    NotRun,
    /// The caller is told that it may have run.
    Unsure,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Action {
    /// A message arrives; its answer too, if there is one, or not.
    Deliver {
        message: Message,
        answered: bool,
    },
    /// A shim claims the slot of a driver, as it saw it.
    Claim {
        shim: usize,
        driver: usize,
    },
    /// It gives up: nothing is idle.
    GiveUp {
        shim: usize,
    },
    /// It waits for its answer no more.
    TimeOut {
        shim: usize,
    },
    /// A driver takes the step after its journal's record.
    Start {
        driver: usize,
        answered: bool,
    },
    /// The same, too late.
    Abort {
        driver: usize,
        answered: bool,
    },
    /// The command ends.
    Exit {
        driver: usize,
    },
    /// Its slot gets its next container.
    Refill {
        driver: usize,
    },
    Crash {
        driver: usize,
    },
    Restart {
        driver: usize,
    },
}

impl Driver {
    fn new() -> Self {
        let mut slot = Life::new(1, None, NOW);
        slot.apply(Event::Warmed, NOW).expect("it is warming");
        Self {
            up: true,
            start_id: 0,
            standing: None,
            claimed: None,
            slot,
            init: Init::Waiting,
            answers: None,
        }
    }

    /// `None` if the answer has to wait for the next step.
    fn on_claim(
        &mut self,
        from: Address,
        start_id: u8,
        generation: u64,
        ballot: Ballot,
    ) -> Option<Answer> {
        let refused = |fenced| Some(Answer::Refused { fenced });
        match Standing::on_claim(self.standing.as_ref(), &(), ballot) {
            OnClaim::Repeat => return Some(Answer::Granted),
            OnClaim::OtherCommand | OnClaim::Released => {
                unreachable!("there is one command, and its results are kept")
            }
            OnClaim::Fenced(_) => return refused(true),
            OnClaim::Take => {}
        }
        if start_id != self.start_id {
            return refused(false);
        }
        let claimed = Event::Claimed {
            generation,
            run_id: RUN.into(),
        };
        if self.slot.apply(claimed, NOW).is_err() {
            return refused(false);
        }
        self.standing = Some(Standing::Ran {
            spec: (),
            kept: true,
        });
        self.claimed = Some(ballot);
        self.answers = Some(from);
        None
    }

    fn on_fence(&mut self, ballot: Ballot) -> Told {
        match Standing::on_fence(self.standing.as_ref(), ballot) {
            OnFence::Have => Told::Have,
            OnFence::Fenced(highest) => {
                self.standing = Some(Standing::Fenced(highest));
                Told::Fenced((highest.attempt, highest.nonce))
            }
        }
    }

    /// Its claim came to nothing.
    fn abort(&mut self) {
        let ballot = self.claimed.take().expect("it was claimed");
        self.standing = Some(Standing::Fenced(ballot));
        let _drained = self.slot.apply(Event::RunEnded, NOW);
    }

    /// As `recover` and the keeper: a run whose init waits was never started; idle
    /// containers are made anew.
    fn restart(&mut self) {
        self.up = true;
        self.start_id += 1;
        self.answers = None;
        if let SlotState::Claimed { .. } = self.slot.state() {
            match self.init {
                Init::Waiting => self.abort(),
                Init::Running => {}
                Init::Exited => drop(self.slot.apply(Event::RunEnded, NOW)),
            }
        } else if *self.slot.state() == SlotState::Idle {
            let died = Event::Died {
                reason: String::new(),
            };
            self.slot.apply(died, NOW).expect("it is idle");
        }
    }

    fn is_to_start(&self) -> bool {
        self.up
            && self.init == Init::Waiting
            && matches!(self.slot.state(), SlotState::Claimed { .. })
    }
}

impl Shim {
    fn address(&self, shim: usize) -> Address {
        Address {
            shim,
            call: self.call,
        }
    }

    /// A new call with a new ballot.
    fn next(&mut self, shim: usize) -> (Address, (u64, u64)) {
        self.call += 1;
        self.ballot.attempt += 1;
        (self.address(shim), (self.ballot.attempt, self.ballot.nonce))
    }
}

impl State {
    fn fence(&mut self, shim: usize) {
        let drivers = self.drivers.len();
        let (from, ballot) = self.shims[shim].next(shim);
        self.shims[shim].does = Does::Fences {
            told: vec![None; drivers],
        };
        self.messages
            .extend((0..drivers).map(|driver| Message::Fence {
                from,
                driver,
                ballot,
            }));
    }

    fn settle(&mut self, shim: usize, driver: usize) {
        let (from, ballot) = self.shims[shim].next(shim);
        self.shims[shim].does = Does::Settles { driver };
        self.messages.insert(Message::Fence {
            from,
            driver,
            ballot,
        });
    }

    /// A message arrives; who is answered, and what.
    fn deliver(&mut self, message: Message) -> Option<(Address, Answer)> {
        let (Message::Claim { driver, .. } | Message::Fence { driver, .. }) = message;
        let node = &mut self.drivers[driver];
        if !node.up {
            return None;
        }
        match message {
            Message::Claim {
                from,
                start_id,
                generation,
                ballot,
                ..
            } => {
                let answer = node.on_claim(from, start_id, generation, unpack(ballot));
                answer.map(|answer| (from, answer))
            }
            Message::Fence { from, ballot, .. } => {
                let told = node.on_fence(unpack(ballot));
                Some((from, Answer::Told { driver, told }))
            }
        }
    }

    /// The shim that waits for it is answered.
    fn answered(&mut self, (to, answer): (Address, Answer)) {
        let number = to.shim;
        let shim = &mut self.shims[number];
        if shim.call != to.call {
            return;
        }
        let own = (shim.ballot.attempt, shim.ballot.nonce);
        match (&mut shim.does, answer) {
            (Does::Claims { .. }, Answer::Granted) => shim.does = Does::Attached,
            (Does::Claims { .. }, Answer::Refused { fenced: true }) => self.fence(number),
            (Does::Claims { .. }, Answer::Refused { fenced: false }) => {
                shim.does = Does::Picks;
            }
            (Does::Settles { .. }, Answer::Told { told, .. }) => match told {
                Told::Have => shim.does = Does::Attached,
                Told::Fenced(fence) if fence == own => shim.does = Does::Picks,
                Told::Fenced(_) => self.fence(number),
                Told::Unsure => shim.does = Does::Unsure,
            },
            (
                Does::Fences { told },
                Answer::Told {
                    driver,
                    told: answer,
                },
            ) => {
                told[driver] = Some(answer);
                if told.iter().all(Option::is_some) {
                    self.fenced(number);
                }
            }
            _ => {}
        }
    }

    /// All have answered, or are not waited for.
    fn fenced(&mut self, number: usize) {
        let shim = &mut self.shims[number];
        let Does::Fences { told } = &shim.does else {
            return;
        };
        let told: Vec<Told> = told
            .iter()
            .map(|told| told.unwrap_or(Told::Unsure))
            .collect();
        let own = (shim.ballot.attempt, shim.ballot.nonce);
        match settle(own, &told, false) {
            Settled::Have => shim.does = Does::Attached,
            Settled::All => shim.does = Does::Picks,
            Settled::Unsure => shim.does = Does::Unsure,
            Settled::Overtaken { attempt } => {
                shim.ballot.attempt = attempt;
                self.fence(number);
            }
        }
    }
}

fn unpack((attempt, nonce): (u64, u64)) -> Ballot {
    Ballot { attempt, nonce }
}

impl Model for Bounds {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let shims = (0..self.shims).map(|number| Shim {
            // The later a try the smaller its nonce: the order that is harder.
            ballot: Ballot {
                attempt: 0,
                nonce: 9 - number as u64,
            },
            call: 0,
            does: Does::Picks,
        });
        let mut state = State {
            drivers: vec![Driver::new(); self.drivers],
            shims: shims.collect(),
            messages: BTreeSet::new(),
            crashes: 0,
            starts: 0,
        };
        // All but the first are retries.
        for shim in 1..self.shims {
            state.fence(shim);
        }
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for message in &state.messages {
            for answered in [false, true] {
                actions.push(Action::Deliver {
                    message: message.clone(),
                    answered,
                });
            }
        }
        for (shim, it) in state.shims.iter().enumerate() {
            match it.does {
                Does::Picks => {
                    let may = it.ballot.attempt < self.attempts;
                    let idle =
                        |driver: &&Driver| driver.up && *driver.slot.state() == SlotState::Idle;
                    for (driver, _) in state.drivers.iter().enumerate().filter(|(_, d)| idle(d)) {
                        if may {
                            actions.push(Action::Claim { shim, driver });
                        }
                    }
                    actions.push(Action::GiveUp { shim });
                }
                Does::Claims { .. } | Does::Settles { .. } | Does::Fences { .. } => {
                    actions.push(Action::TimeOut { shim });
                }
                Does::Attached | Does::NotRun | Does::Unsure => {}
            }
        }
        for (driver, it) in state.drivers.iter().enumerate() {
            if !it.up {
                actions.push(Action::Restart { driver });
                if it.init == Init::Running {
                    actions.push(Action::Exit { driver });
                }
                continue;
            }
            if it.is_to_start() {
                for answered in [false, true] {
                    actions.push(Action::Start { driver, answered });
                    actions.push(Action::Abort { driver, answered });
                }
            }
            if it.init == Init::Running {
                actions.push(Action::Exit { driver });
            }
            if *it.slot.state() == SlotState::Recycling {
                actions.push(Action::Refill { driver });
            }
            if state.crashes < self.crashes {
                actions.push(Action::Crash { driver });
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Deliver { message, answered } => {
                if let Some(answer) = state.deliver(message).filter(|_| answered) {
                    state.answered(answer);
                }
            }
            Action::Claim { shim, driver } => {
                let (from, ballot) = state.shims[shim].next(shim);
                state.shims[shim].does = Does::Claims { driver };
                state.messages.insert(Message::Claim {
                    from,
                    driver,
                    start_id: state.drivers[driver].start_id,
                    generation: state.drivers[driver].slot.generation(),
                    ballot,
                });
            }
            Action::GiveUp { shim } => state.shims[shim].does = Does::NotRun,
            Action::TimeOut { shim } => {
                let may = state.shims[shim].ballot.attempt < self.attempts;
                match state.shims[shim].does {
                    Does::Claims { driver } | Does::Settles { driver } if may => {
                        state.settle(shim, driver);
                    }
                    Does::Fences { .. } => state.fenced(shim),
                    _ => state.shims[shim].does = Does::Unsure,
                }
            }
            Action::Start { driver, answered } => {
                let node = &mut state.drivers[driver];
                node.init = Init::Running;
                state.starts += 1;
                if let Some(to) = node.answers.take().filter(|_| answered) {
                    state.answered((to, Answer::Granted));
                }
            }
            Action::Abort { driver, answered } => {
                let node = &mut state.drivers[driver];
                node.abort();
                if let Some(to) = node.answers.take().filter(|_| answered) {
                    state.answered((to, Answer::Refused { fenced: false }));
                }
            }
            Action::Exit { driver } => {
                let node = &mut state.drivers[driver];
                node.init = Init::Exited;
                if node.up {
                    node.slot
                        .apply(Event::RunEnded, NOW)
                        .expect("a run is in it");
                }
            }
            Action::Refill { driver } => {
                let node = &mut state.drivers[driver];
                for event in [Event::Recycled, Event::Warmed] {
                    node.slot.apply(event, NOW).expect("it is recycling");
                }
                node.init = Init::Waiting;
            }
            Action::Crash { driver } => {
                state.crashes += 1;
                state.drivers[driver].up = false;
            }
            Action::Restart { driver } => state.drivers[driver].restart(),
        }
        (state != *last).then_some(state)
    }

    fn within_boundary(&self, state: &State) -> bool {
        state
            .shims
            .iter()
            .all(|shim| shim.ballot.attempt <= self.attempts + 2)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("the run is started once at most", |_, state: &State| {
                state.starts <= 1
            }),
            Property::always(
                "a try that is alone is told the truth",
                |model: &Bounds, state: &State| {
                    let alone = model.shims == 1;
                    let told = &state.shims[0].does;
                    let in_doubt = state.drivers.iter().any(|driver| driver.claimed.is_some());
                    !alone || *told != Does::NotRun || (state.starts == 0 && !in_doubt)
                },
            ),
            Property::always(
                "a claim that was granted is not forgotten",
                |_, state: &State| {
                    let knows =
                        |driver: &Driver| matches!(driver.standing, Some(Standing::Ran { .. }));
                    state.starts == 0 || state.drivers.iter().any(knows)
                },
            ),
            // Not `eventually`: it is not sound where ways meet, as they do here.
            Property::always(
                "when nothing more happens everybody is told, and every slot is warm",
                |model: &Bounds, state: &State| {
                    let told = |shim: &Shim| {
                        matches!(shim.does, Does::Attached | Does::NotRun | Does::Unsure)
                    };
                    let warm =
                        |driver: &Driver| driver.up && *driver.slot.state() == SlotState::Idle;
                    if state.shims.iter().all(told) && state.drivers.iter().all(warm) {
                        return true;
                    }
                    let mut actions = Vec::new();
                    model.actions(state, &mut actions);
                    let mut next = actions.into_iter();
                    next.any(|action| model.next_state(state, action).is_some())
                },
            ),
            Property::sometimes("it runs", |_, state: &State| state.starts == 1),
            Property::sometimes(
                "a try finds the run of another",
                |model: &Bounds, state: &State| {
                    let attached = state
                        .shims
                        .iter()
                        .filter(|shim| shim.does == Does::Attached);
                    attached.count() == model.shims
                },
            ),
            Property::sometimes(
                "a claim comes to nothing after it was journalled",
                |_, state: &State| {
                    let aborted = |driver: &Driver| {
                        driver.start_id == 0
                            && *driver.slot.state() == SlotState::Recycling
                            && matches!(driver.standing, Some(Standing::Fenced(_)))
                    };
                    state.drivers.iter().any(aborted)
                },
            ),
        ]
    }
}

fn check(bounds: Bounds) {
    let checker = bounds.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    let states = checker.unique_state_count();
    assert!(states > 1000, "{states} states are no search");
}

#[test]
fn one_try_over_two_nodes_with_crashes() {
    check(Bounds {
        shims: 1,
        drivers: 2,
        crashes: 2,
        attempts: 3,
    });
}

#[test]
fn a_retry_while_the_first_try_is_on_its_way() {
    check(Bounds {
        shims: 2,
        drivers: 2,
        crashes: 1,
        attempts: 2,
    });
}

#[test]
fn a_retry_at_a_node_that_crashes() {
    check(Bounds {
        shims: 2,
        drivers: 1,
        crashes: 1,
        attempts: 2,
    });
}
