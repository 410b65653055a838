//! What is killed, and when it is there again.

use std::{
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use polydev_tests::{docker, nomad::Nomad, process::output, shim::Shim, wait_until};
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

use crate::caller::Addresses;

const SHIMS: usize = 2;
const BACK: Duration = Duration::from_secs(60);

/// A part that is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// kill -9.
    Driver,
    /// kill -9, and a new one at once.
    Shim,
    /// kill -9 of the agent, which leaves the driver; then a new one.
    AgentKilled,
    /// A clean stop of the agent, which ends the driver; then a new one.
    AgentStopped,
    /// Any container, with init and command.
    Container,
    /// The driver twice, as soon as there is another one.
    DriverTwice,
}

impl Fault {
    pub(crate) const ALL: [Self; 6] = [
        Self::Driver,
        Self::Shim,
        Self::AgentKilled,
        Self::AgentStopped,
        Self::Container,
        Self::DriverTwice,
    ];

    pub(crate) fn random(rng: &mut StdRng) -> Self {
        let fault = Self::ALL.choose_weighted(rng, |fault| match fault {
            // While its agent is away a node has no driver, and nothing is shown but waiting.
            Self::AgentKilled | Self::AgentStopped => 1,
            _ => 2,
        });
        *fault.expect("there are some, with weights")
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Driver => "driver killed",
            Self::Shim => "shim killed",
            Self::AgentKilled => "agent killed",
            Self::AgentStopped => "agent stopped",
            Self::Container => "container killed",
            Self::DriverTwice => "driver, twice",
        }
    }
}

/// The parts that are killed, as they are now.
pub(crate) struct Parts {
    // The shims end before the cluster they are in front of.
    shims: Vec<Shim>,
    addresses: Addresses,
    pub(crate) nomad: Nomad,
    /// Of the driver's containers.
    label: String,
}

impl Parts {
    pub(crate) fn start(nomad: Nomad, label: String) -> Self {
        let shims: Vec<Shim> = (0..SHIMS).map(|_| Shim::serve(&nomad.address)).collect();
        let addresses = shims.iter().map(|shim| shim.address.clone()).collect();
        Self {
            shims,
            addresses: Addresses(Arc::new(Mutex::new(addresses))),
            nomad,
            label,
        }
    }

    pub(crate) fn addresses(&self) -> Addresses {
        self.addresses.clone()
    }

    /// Kills something, and waits until it is there again; how long that took.
    pub(crate) fn inject(&mut self, fault: Fault, rng: &mut StdRng) -> Duration {
        let begun = Instant::now();
        match fault {
            Fault::Driver => self.kill_driver(),
            Fault::DriverTwice => {
                self.kill_driver();
                self.kill_driver();
            }
            Fault::Shim => {
                let which = rng.random_range(0..SHIMS);
                self.shims[which].process.signal(Signal::SIGKILL);
                self.shims[which] = Shim::serve(&self.nomad.address);
                let address = self.shims[which].address.clone();
                self.addresses
                    .0
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)[which] = address;
            }
            Fault::AgentKilled => {
                self.nomad.agent().signal(Signal::SIGKILL);
                self.nomad.restart();
            }
            Fault::AgentStopped => self.nomad.restart(),
            Fault::Container => {
                if let Some(container) = docker::containers(&self.label).choose(rng) {
                    // It may have ended meanwhile.
                    output(docker::command().args(["kill", container]));
                }
            }
        }
        self.nomad.wait_healthy();
        begun.elapsed()
    }

    fn kill_driver(&self) {
        let before = self.driver();
        if let Some(pid) = before {
            let _gone = kill(pid, Signal::SIGKILL);
        }
        wait_until("another driver", BACK, || match self.driver() {
            Some(pid) if Some(pid) != before => Ok(()),
            same => Err(format!("{same:?}")),
        });
    }

    /// The driver that has the node.
    fn driver(&self) -> Option<Pid> {
        let holder = fs::read_to_string(self.nomad.state_dir().join("driver.lock"));
        Some(Pid::from_raw(holder.ok()?.trim().parse().ok()?))
    }
}
