//! Kills parts of the system, and waits until they are back.

use std::{
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use polydev_tests::{
    broker::brokers,
    cluster::{Cluster, NODES},
    shim::Shim,
    wait_until,
};
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

use crate::caller::Addresses;

const SHIMS: usize = 2;
const BACK: Duration = Duration::from_secs(60);
/// How long a dockerd may stay away.
const AWAY: Duration = Duration::from_secs(5);

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
    /// kill -9 of the server, and a new one at once.
    Server,
    /// kill -9 of dockerd, which stays away for up to five seconds.
    Dockerd,
    /// Any container, with init and command.
    Container,
    /// kill -9 of the broker, which the driver starts again.
    Broker,
    /// The driver twice, as soon as there is another one.
    DriverTwice,
}

impl Fault {
    pub(crate) const ALL: [Self; 9] = [
        Self::Driver,
        Self::Shim,
        Self::AgentKilled,
        Self::AgentStopped,
        Self::Server,
        Self::Dockerd,
        Self::Container,
        Self::Broker,
        Self::DriverTwice,
    ];

    pub(crate) fn random(rng: &mut StdRng) -> Self {
        *Self::ALL.choose(rng).expect("there are some")
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Driver => "driver killed",
            Self::Shim => "shim killed",
            Self::AgentKilled => "agent killed",
            Self::AgentStopped => "agent stopped",
            Self::Server => "server killed",
            Self::Dockerd => "dockerd killed",
            Self::Container => "container killed",
            Self::Broker => "broker killed",
            Self::DriverTwice => "driver, twice",
        }
    }
}

/// The parts that can be killed, in their present state.
pub(crate) struct Parts {
    // Dropped first: the shims end before their cluster.
    shims: Vec<Shim>,
    addresses: Addresses,
    pub(crate) cluster: Cluster,
}

impl Parts {
    pub(crate) fn start(cluster: Cluster) -> Self {
        let shims: Vec<Shim> = (0..SHIMS).map(|_| cluster.shim()).collect();
        let addresses = shims.iter().map(|shim| shim.address.clone()).collect();
        Self {
            shims,
            addresses: Addresses(Arc::new(Mutex::new(addresses))),
            cluster,
        }
    }

    pub(crate) fn addresses(&self) -> Addresses {
        self.addresses.clone()
    }

    /// Kills a part, and waits until the part is back. Returns how long that took.
    pub(crate) fn inject(&mut self, fault: Fault, rng: &mut StdRng) -> Duration {
        let begun = Instant::now();
        let node = rng.random_range(0..NODES);
        match fault {
            Fault::Driver => self.kill_driver(node),
            Fault::Broker => self.kill_broker(node),
            Fault::DriverTwice => {
                self.kill_driver(node);
                self.kill_driver(node);
            }
            Fault::Shim => {
                let which = rng.random_range(0..SHIMS);
                self.shims[which].process.signal(Signal::SIGKILL);
                self.shims[which] = self.cluster.shim();
                let address = self.shims[which].address.clone();
                self.addresses
                    .0
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)[which] = address;
            }
            Fault::AgentKilled => self.cluster.restart_agent(node, Signal::SIGKILL),
            Fault::AgentStopped => self.cluster.restart_agent(node, Signal::SIGTERM),
            Fault::Server => self.cluster.restart_server(),
            Fault::Dockerd => {
                let engine = &mut self.cluster.engines[node];
                engine.kill();
                std::thread::park_timeout(AWAY.mul_f64(rng.random()));
                engine.restart();
            }
            Fault::Container => {
                if let Some(container) = self.cluster.containers(node, "{{.ID}}").choose(rng) {
                    self.cluster.engines[node].end(container);
                }
            }
        }
        self.cluster.wait_healthy();
        begun.elapsed()
    }

    fn kill_driver(&self, node: usize) {
        let before = self.driver(node);
        if let Some(pid) = before {
            let _gone = kill(pid, Signal::SIGKILL);
        }
        wait_until("another driver", BACK, || match self.driver(node) {
            Some(pid) if Some(pid) != before => Ok(()),
            same => Err(format!("{same:?}")),
        });
    }

    fn kill_broker(&self, node: usize) {
        let state_dir = self.cluster.state_dir(node);
        let before = brokers(&state_dir);
        for pid in &before {
            let _gone = kill(*pid, Signal::SIGKILL);
        }
        wait_until("another broker", BACK, || {
            let now = brokers(&state_dir);
            let is_new = now.iter().any(|pid| !before.contains(pid));
            is_new.then_some(()).ok_or(format!("{now:?}"))
        });
    }

    /// The driver that has the node.
    fn driver(&self, node: usize) -> Option<Pid> {
        let holder = fs::read_to_string(self.cluster.state_dir(node).join("driver.lock"));
        Some(Pid::from_raw(holder.ok()?.trim().parse().ok()?))
    }
}
