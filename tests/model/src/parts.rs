//! The parts of the model, and what each does with a message: shims, drivers with one slot
//! each, and the messages between them.

use std::collections::BTreeSet;

use polydev_driver::{
    life::{Event, Life, State as SlotState},
    run::{
        Ballot,
        standing::{OnClaim, OnFence, Standing},
    },
};
use polydev_proto::id::{Generation, RunId};
use polydev_shim::run::fence::{Alone, Settled, Told, alone, settle};

use super::NOW;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct State {
    pub(super) drivers: Vec<Driver>,
    pub(super) shims: Vec<Shim>,
    /// All messages ever sent. Each may arrive at any time, any number of times, or never.
    pub(super) messages: BTreeSet<Message>,
    pub(super) crashes: u8,
    /// How often an init was told to start each run.
    pub(super) starts: Vec<u8>,
}

/// A driver with one slot.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Driver {
    pub(super) up: bool,
    /// The driver joined after the runs were made. It cannot know whether it has forgotten a run.
    pub(super) newer: bool,
    /// For each run, the newer drivers to which the run goes, as this driver was told.
    pub(super) told_of: Vec<BTreeSet<usize>>,
    /// Renewed by each start.
    pub(super) start_id: u8,
    /// What the journal says of each run, and the run that was claimed last, with its ballot.
    pub(super) standing: Vec<Option<Standing<()>>>,
    pub(super) claimed: Option<(usize, Ballot)>,
    pub(super) slot: Life,
    /// The runs that got the slot's container.
    pub(super) granted: Vec<usize>,
    /// The state of the slot's container.
    pub(super) init: Init,
    /// The try that waits for the answer to its claim.
    pub(super) answers: Option<Address>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Init {
    Waiting,
    Running,
    Exited,
}

/// Who gets an answer: a shim, and the number of its call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Address {
    pub(super) shim: usize,
    pub(super) call: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Message {
    Claim {
        from: Address,
        run: usize,
        driver: usize,
        start_id: u8,
        generation: Generation,
        ballot: (u64, u64),
    },
    Fence {
        from: Address,
        run: usize,
        driver: usize,
        ballot: (u64, u64),
        /// The try goes to this newer driver.
        claims_on: Option<usize>,
    },
}

/// The id of a run.
fn id(run: usize) -> RunId {
    RunId::new(NOW, [u8::try_from(run).expect("there are few"); 10])
}

/// The answer of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Granted,
    Refused { fenced: bool },
    Told { driver: usize, told: Heard },
}

/// One try of a run.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shim {
    pub(super) run: usize,
    pub(super) ballot: Ballot,
    /// How many drivers the shim knows. The newer drivers are the last ones.
    pub(super) sees: usize,
    /// The number of the shim's call. The shim ignores the answer to an earlier call.
    pub(super) call: u64,
    pub(super) does: Does,
}

/// What a shim knows from a driver that it asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Heard {
    Nothing,
    /// The driver is newer than the run.
    Newer,
    Told(Told),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Does {
    /// Picks a slot.
    Picks,
    Claims {
        driver: usize,
    },
    /// Asks the driver whose answer was unclear.
    Settles {
        driver: usize,
    },
    /// Asks all drivers that it sees.
    Fences {
        told: Vec<Heard>,
        /// The newer drivers to which tries have gone, as the answers say.
        went_to: BTreeSet<usize>,
    },
    /// Asks all drivers but the newer one on which it will claim.
    Announces {
        driver: usize,
        told: Vec<Heard>,
    },
    /// The shim has the run, which its own or another try started.
    Attached,
    /// The caller is told that the command did not run.
    NotRun,
    /// The caller is told that it may have run.
    Unsure,
}

impl Driver {
    pub(super) fn new(runs: usize) -> Self {
        let mut slot = Life::new(Generation(1), None, NOW);
        slot.apply(Event::Warmed, NOW).expect("it is warming");
        Self {
            up: true,
            newer: false,
            told_of: vec![BTreeSet::new(); runs],
            start_id: 0,
            standing: vec![None; runs],
            claimed: None,
            slot,
            granted: Vec::new(),
            init: Init::Waiting,
            answers: None,
        }
    }

    /// `None` if the answer has to wait for the next step.
    fn on_claim(
        &mut self,
        from: Address,
        run: usize,
        start_id: u8,
        generation: Generation,
        ballot: Ballot,
    ) -> Option<Answer> {
        let refused = |fenced| Some(Answer::Refused { fenced });
        match Standing::on_claim(self.standing[run].as_ref(), &(), ballot) {
            OnClaim::Repeat => return Some(Answer::Granted),
            OnClaim::OtherCommand | OnClaim::Released => {
                unreachable!("there is one command, and its results are kept")
            }
            OnClaim::Fenced(_) => return refused(true),
            OnClaim::OtherUser => return refused(true),
            OnClaim::Take => {}
        }
        if start_id != self.start_id {
            return refused(false);
        }
        let claimed = Event::Claimed {
            generation,
            run_id: id(run),
            user_id: "alice".into(),
        };
        if self.slot.apply(claimed, NOW).is_err() {
            return refused(false);
        }
        self.standing[run] = Some(Standing::Ran {
            spec: (),
            kept: true,
        });
        self.told_of[run].clear();
        self.claimed = Some((run, ballot));
        self.granted.push(run);
        self.answers = Some(from);
        None
    }

    fn on_fence(&mut self, run: usize, ballot: Ballot, claims_on: Option<usize>) -> Heard {
        let knows = !matches!(self.standing[run], None | Some(Standing::OtherUser));
        if self.newer && !knows {
            return Heard::Newer;
        }
        Heard::Told(self.fenced(run, ballot, claims_on))
    }

    fn fenced(&mut self, run: usize, ballot: Ballot, claims_on: Option<usize>) -> Told {
        match Standing::on_fence(self.standing[run].as_ref(), ballot) {
            OnFence::Have => Told::Have,
            OnFence::OtherUser => Told::OtherUser,
            OnFence::Fenced(highest) => {
                self.standing[run] = Some(Standing::Fenced(highest));
                self.told_of[run].extend(claims_on);
                Told::Fenced((highest.attempt, highest.nonce))
            }
        }
    }

    /// The claim had no effect.
    pub(super) fn abort(&mut self) {
        let (run, ballot) = self.claimed.take().expect("it was claimed");
        self.standing[run] = Some(Standing::Fenced(ballot));
        let _drained = self.slot.apply(Event::RunEnded, NOW);
    }

    /// Does as `recover` and the keeper do. A run whose init waits was never started. An idle
    /// container is taken over or replaced.
    pub(super) fn restart(&mut self, adopts: bool) {
        self.up = true;
        self.start_id += 1;
        self.answers = None;
        if let SlotState::Claimed { .. } = self.slot.state() {
            match self.init {
                Init::Waiting => self.abort(),
                Init::Running => {}
                Init::Exited => drop(self.slot.apply(Event::RunEnded, NOW)),
            }
        } else if *self.slot.state() == SlotState::Idle && adopts {
            self.slot = Life::new(self.slot.generation(), None, NOW);
            self.slot.apply(Event::Warmed, NOW).expect("it is warming");
        } else if *self.slot.state() == SlotState::Idle {
            let died = Event::Died {
                reason: String::new(),
            };
            self.slot.apply(died, NOW).expect("it is idle");
        }
    }

    pub(super) fn is_to_start(&self) -> bool {
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
    pub(super) fn next(&mut self, shim: usize) -> (Address, (u64, u64)) {
        self.call += 1;
        self.ballot.attempt += 1;
        (self.address(shim), (self.ballot.attempt, self.ballot.nonce))
    }
}

impl State {
    /// A shim claims the slot of a driver in the state that the shim saw.
    pub(super) fn claim(&mut self, shim: usize, driver: usize) {
        let (from, ballot) = self.shims[shim].next(shim);
        self.shims[shim].does = Does::Claims { driver };
        self.messages.insert(Message::Claim {
            from,
            run: self.shims[shim].run,
            driver,
            start_id: self.drivers[driver].start_id,
            generation: self.drivers[driver].slot.generation(),
            ballot,
        });
    }

    /// The shim is about to claim the slot of a newer driver.
    pub(super) fn announce(&mut self, shim: usize, driver: usize) {
        let it = &mut self.shims[shim];
        it.call += 1;
        let mut told = vec![Heard::Nothing; it.sees];
        // The shim does not ask this driver.
        told[driver] = Heard::Newer;
        it.does = Does::Announces { driver, told };
        let (from, run, nonce) = (it.address(shim), it.run, it.ballot.nonce);
        let others = (0..it.sees).filter(|other| *other != driver);
        self.messages.extend(others.map(|other| Message::Fence {
            from,
            run,
            driver: other,
            ballot: (0, nonce),
            claims_on: Some(driver),
        }));
        self.announced(shim, false);
    }

    pub(super) fn fence(&mut self, shim: usize) {
        let drivers = self.shims[shim].sees;
        let (from, ballot) = self.shims[shim].next(shim);
        let run = self.shims[shim].run;
        self.shims[shim].does = Does::Fences {
            told: vec![Heard::Nothing; drivers],
            went_to: BTreeSet::new(),
        };
        self.messages
            .extend((0..drivers).map(|driver| Message::Fence {
                from,
                run,
                driver,
                ballot,
                claims_on: None,
            }));
    }

    pub(super) fn settle(&mut self, shim: usize, driver: usize) {
        let (from, ballot) = self.shims[shim].next(shim);
        self.shims[shim].does = Does::Settles { driver };
        self.messages.insert(Message::Fence {
            from,
            run: self.shims[shim].run,
            driver,
            ballot,
            claims_on: None,
        });
    }

    /// A message arrives. Returns who gets an answer, and the answer.
    pub(super) fn deliver(&mut self, message: Message) -> Option<(Address, Answer)> {
        let (Message::Claim { driver, .. } | Message::Fence { driver, .. }) = message;
        let node = &mut self.drivers[driver];
        if !node.up {
            return None;
        }
        match message {
            Message::Claim {
                from,
                run,
                start_id,
                generation,
                ballot,
                ..
            } => {
                let answer = node.on_claim(from, run, start_id, generation, unpack(ballot));
                answer.map(|answer| (from, answer))
            }
            Message::Fence {
                from,
                run,
                ballot,
                claims_on,
                ..
            } => {
                let told = node.on_fence(run, unpack(ballot), claims_on);
                Some((from, Answer::Told { driver, told }))
            }
        }
    }

    /// The answer reaches the shim that waits for it.
    pub(super) fn answered(&mut self, (to, answer): (Address, Answer)) {
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
                Heard::Told(Told::Have) => shim.does = Does::Attached,
                Heard::Told(Told::OtherUser) => shim.does = Does::Picks,
                Heard::Told(Told::Fenced(fence)) if fence == own => shim.does = Does::Picks,
                Heard::Told(Told::Fenced(_)) => self.fence(number),
                Heard::Told(Told::Unsure) | Heard::Newer | Heard::Nothing => {
                    shim.does = Does::Unsure;
                }
            },
            (
                Does::Fences { told, went_to },
                Answer::Told {
                    driver,
                    told: answer,
                },
            ) => {
                told[driver] = answer;
                went_to.extend(&self.drivers[driver].told_of[shim.run]);
                if !told.contains(&Heard::Nothing) {
                    self.fenced(number);
                }
            }
            (
                Does::Announces { told, .. },
                Answer::Told {
                    driver,
                    told: answer,
                },
            ) => {
                told[driver] = answer;
                self.announced(number, false);
            }
            _ => {}
        }
    }

    /// All others have answered, or the shim no longer waits for them.
    pub(super) fn announced(&mut self, number: usize, timed_out: bool) {
        let shim = &mut self.shims[number];
        let Does::Announces { driver, told } = &shim.does else {
            return;
        };
        if told.contains(&Heard::Nothing) && !timed_out {
            return;
        }
        let driver = *driver;
        let told: Vec<Told> = told
            .iter()
            .filter_map(|heard| match heard {
                Heard::Told(told) => Some(*told),
                Heard::Nothing => Some(Told::Unsure),
                Heard::Newer => None,
            })
            .collect();
        match alone(shim.ballot.nonce, &told) {
            Alone::Yes => self.claim(number, driver),
            Alone::Have => shim.does = Does::Attached,
            Alone::Overtaken => self.fence(number),
            // The effect is the same as a refused slot.
            Alone::Unsure => shim.does = Does::Picks,
        }
    }

    /// All have answered, or the shim no longer waits for them.
    pub(super) fn fenced(&mut self, number: usize) {
        let shim = &mut self.shims[number];
        let Does::Fences { told, went_to } = &shim.does else {
            return;
        };
        let asked = told.len();
        let told = told.iter().map(|heard| match heard {
            Heard::Told(told) => *told,
            Heard::Nothing | Heard::Newer => Told::Unsure,
        });
        let unasked = went_to.iter().filter(|driver| **driver >= asked);
        let told: Vec<Told> = told.chain(unasked.map(|_| Told::Unsure)).collect();
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
