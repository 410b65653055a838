//! A model check of the claim protocol: every order of steps of shims, drivers and inits, of
//! crashes, and of lost, late and repeated messages, for small numbers of each. The model has no
//! decisions of its own: `Standing`, `Life` and `settle` are those of the driver and the shim.
//!
//! Several shims try each run. The first makes a first try, the others retry. The model has no
//! time: a request may arrive at any time, also later than `start_by` allows, and any number of
//! times. An answer comes at once or never. A shim does nothing else while it waits, so a late
//! answer is the same as the answer to a late request.

#![cfg(test)]

mod parts;

use std::{collections::BTreeSet, time::SystemTime};

use polydev_driver::{
    life::{Event, State as SlotState},
    run::{Ballot, standing::Standing},
};
use stateright::{Checker, Model, Property};

use parts::{Answer, Does, Driver, Init, Message, Shim, State};

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

/// The numbers of everything in the model.
#[derive(Clone, Copy)]
struct Bounds {
    /// Runs, which the shims try in turn.
    runs: usize,
    shims: usize,
    drivers: usize,
    /// How many drivers join after the runs were made. A shim sees them at any time, or never.
    newer: usize,
    /// How many drivers may see the id of the first run with another user's run.
    others: usize,
    /// Of drivers, in all.
    crashes: u8,
    /// Claims and fences of a first try, and of a retry.
    attempts: [u64; 2],
}

impl Bounds {
    /// How many claims and fences the shim may make.
    fn attempts(&self, shim: usize) -> u64 {
        self.attempts[usize::from(shim >= self.runs)]
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Action {
    /// A message arrives. Its answer, if there is one, arrives or is lost.
    Deliver {
        message: Message,
        answered: bool,
    },
    /// A shim claims the slot of a driver in the state that the shim saw.
    Claim {
        shim: usize,
        driver: usize,
    },
    /// The shim sees one more driver.
    See {
        shim: usize,
    },
    /// The shim gives up: no slot is idle.
    GiveUp {
        shim: usize,
    },
    /// The shim no longer waits for an answer.
    TimeOut {
        shim: usize,
    },
    /// A driver takes the step after the record in its journal.
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
    /// The slot gets its next container.
    Refill {
        driver: usize,
    },
    Crash {
        driver: usize,
    },
    /// Another user's run comes, or a fence of it, with the id of the first run.
    Bind {
        driver: usize,
    },
    /// The driver takes over an idle container, or does not.
    Restart {
        driver: usize,
        adopts: bool,
    },
}

impl Model for Bounds {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let shims = (0..self.shims).map(|number| Shim {
            run: number % self.runs,
            // A later try has a smaller nonce, which is the harder order.
            ballot: Ballot {
                attempt: 0,
                nonce: 9 - number as u64,
            },
            sees: self.drivers - self.newer,
            call: 0,
            does: Does::Picks,
        });
        let mut state = State {
            drivers: vec![Driver::new(self.runs); self.drivers],
            shims: shims.collect(),
            messages: BTreeSet::new(),
            crashes: 0,
            starts: vec![0; self.runs],
        };
        for driver in state.drivers.iter_mut().rev().take(self.newer) {
            driver.newer = true;
        }
        // All tries of a run but the first are retries.
        for shim in self.runs..self.shims {
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
                    // An announcement is a call, but not an attempt.
                    let may = it.ballot.attempt < self.attempts(shim)
                        && (self.newer == 0 || it.call <= self.attempts(shim));
                    let idle =
                        |driver: &&Driver| driver.up && *driver.slot.state() == SlotState::Idle;
                    let seen = state.drivers.iter().take(it.sees);
                    for (driver, _) in seen.enumerate().filter(|(_, d)| idle(d)) {
                        if may {
                            actions.push(Action::Claim { shim, driver });
                        }
                    }
                    actions.push(Action::GiveUp { shim });
                }
                Does::Claims { .. }
                | Does::Settles { .. }
                | Does::Fences { .. }
                | Does::Announces { .. } => {
                    actions.push(Action::TimeOut { shim });
                }
                Does::Attached | Does::NotRun | Does::Unsure => {}
            }
            if it.sees < self.drivers {
                actions.push(Action::See { shim });
            }
        }
        let is_others = |driver: &&Driver| driver.standing[0] == Some(Standing::OtherUser);
        let others = state.drivers.iter().filter(is_others).count();
        for (driver, it) in state.drivers.iter().enumerate() {
            if others < self.others && it.standing[0].is_none() {
                actions.push(Action::Bind { driver });
            }
            if !it.up {
                for adopts in [false, true] {
                    actions.push(Action::Restart { driver, adopts });
                }
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
                if state.drivers[driver].newer {
                    state.announce(shim, driver);
                } else {
                    state.claim(shim, driver);
                }
            }
            Action::See { shim } => state.shims[shim].sees += 1,
            Action::GiveUp { shim } => state.shims[shim].does = Does::NotRun,
            Action::TimeOut { shim } => {
                let may = state.shims[shim].ballot.attempt < self.attempts(shim);
                match state.shims[shim].does {
                    Does::Claims { driver } | Does::Settles { driver } if may => {
                        state.settle(shim, driver);
                    }
                    Does::Fences { .. } => state.fenced(shim),
                    Does::Announces { .. } => state.announced(shim, true),
                    _ => state.shims[shim].does = Does::Unsure,
                }
            }
            Action::Start { driver, answered } => {
                let node = &mut state.drivers[driver];
                node.init = Init::Running;
                let (run, _) = node.claimed.as_ref().expect("it was claimed");
                state.starts[*run] += 1;
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
                node.granted.clear();
            }
            Action::Crash { driver } => {
                state.crashes += 1;
                state.drivers[driver].up = false;
            }
            Action::Bind { driver } => {
                state.drivers[driver].standing[0] = Some(Standing::OtherUser);
            }
            Action::Restart { driver, adopts } => state.drivers[driver].restart(adopts),
        }
        (state != *last).then_some(state)
    }

    fn within_boundary(&self, state: &State) -> bool {
        let mut shims = state.shims.iter().enumerate();
        shims.all(|(number, shim)| shim.ballot.attempt <= self.attempts(number) + 2)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("a run is started once at most", |_, state: &State| {
                state.starts.iter().all(|starts| *starts <= 1)
            }),
            Property::always("a container serves one run at most", |_, state: &State| {
                let drivers = state.drivers.iter();
                drivers
                    .map(|driver| driver.granted.len())
                    .all(|runs| runs <= 1)
            }),
            Property::always(
                "a try that is alone is told the truth",
                |model: &Bounds, state: &State| {
                    let alone = model.shims == 1;
                    let told = &state.shims[0].does;
                    let in_doubt = state.drivers.iter().any(|driver| driver.claimed.is_some());
                    !alone || *told != Does::NotRun || (state.starts[0] == 0 && !in_doubt)
                },
            ),
            Property::always(
                "a claim that was granted is not forgotten",
                |_, state: &State| {
                    state.starts.iter().enumerate().all(|(run, starts)| {
                        let knows = |driver: &Driver| {
                            matches!(driver.standing[run], Some(Standing::Ran { .. }))
                        };
                        *starts == 0 || state.drivers.iter().any(knows)
                    })
                },
            ),
            // Not `eventually`, which is not sound if paths meet, as they do here.
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
            Property::sometimes("all run", |_, state: &State| {
                state.starts.iter().all(|starts| *starts == 1)
            }),
            Property::sometimes(
                "every try has its run, its own or another's",
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
                            && matches!(driver.standing[0], Some(Standing::Fenced(_)))
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
fn two_runs_at_a_node_that_crashes() {
    check(Bounds {
        runs: 2,
        shims: 2,
        drivers: 1,
        newer: 0,
        others: 0,
        crashes: 1,
        attempts: [2; 2],
    });
}

#[test]
fn one_try_over_two_nodes_with_crashes() {
    check(Bounds {
        runs: 1,
        shims: 1,
        drivers: 2,
        newer: 0,
        others: 0,
        crashes: 2,
        attempts: [3; 2],
    });
}

#[test]
fn a_retry_while_the_first_try_is_on_its_way() {
    check(Bounds {
        runs: 1,
        shims: 2,
        drivers: 2,
        newer: 0,
        others: 0,
        crashes: 1,
        attempts: [2; 2],
    });
}

#[test]
fn a_retry_while_a_node_joins() {
    check(Bounds {
        runs: 1,
        shims: 2,
        drivers: 2,
        newer: 1,
        others: 0,
        crashes: 1,
        attempts: [1, 2],
    });
}

#[test]
fn a_run_that_waits_for_the_first_nodes() {
    check(Bounds {
        runs: 1,
        shims: 1,
        drivers: 2,
        newer: 2,
        others: 0,
        crashes: 1,
        attempts: [2; 2],
    });
}

#[test]
fn a_retry_at_a_node_that_crashes() {
    check(Bounds {
        runs: 1,
        shims: 2,
        drivers: 1,
        newer: 0,
        others: 0,
        crashes: 1,
        attempts: [2; 2],
    });
}

#[test]
fn a_retry_where_another_users_run_has_its_id() {
    check(Bounds {
        runs: 1,
        shims: 2,
        drivers: 2,
        newer: 0,
        others: 1,
        crashes: 1,
        attempts: [1, 2],
    });
}

/// A newer node may have had the run, and have forgotten it, before the other user's run came.
#[test]
fn a_retry_while_a_node_joins_where_another_users_run_has_its_id() {
    check(Bounds {
        runs: 1,
        shims: 2,
        drivers: 2,
        newer: 1,
        others: 1,
        crashes: 0,
        attempts: [1, 2],
    });
}

/// Minutes.
mod long {
    use super::*;

    #[test]
    fn a_retry_while_two_nodes_join() {
        check(Bounds {
            runs: 1,
            shims: 2,
            drivers: 3,
            newer: 2,
            others: 0,
            crashes: 0,
            attempts: [1, 2],
        });
    }
}
