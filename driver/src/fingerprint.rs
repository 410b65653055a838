//! Finds out whether this node can run slots, and if not, why. One task checks this, takes
//! charge of the node as soon as it can, and publishes the result.

use std::{
    collections::BTreeMap,
    error::Error,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    chain, config, docker,
    events::Events,
    firewall::Guard,
    limits,
    node::{self, Node},
    site::Compute,
    state::lock::{self, Lock},
};

const HEALTH_INTERVAL: Duration = Duration::from_secs(2);
/// How often the bridge is checked, because other programs may remove it.
const BRIDGE_INTERVAL: Duration = Duration::from_secs(30);
/// How long the rules of the bridge may take to be set before the node is unhealthy.
const GUARD_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a dockerd may be too busy to answer before the node is unhealthy: a busy machine
/// should not lose its node.
const BUSY_TIMEOUT: Duration = Duration::from_secs(15);

/// What the driver reports to Nomad about itself on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Not configured yet: no agent uses this process.
    Unconfigured,
    Unhealthy {
        reason: String,
    },
    Healthy {
        attributes: BTreeMap<String, String>,
    },
}

/// Watches Docker and the state folder forever.
pub async fn run(
    config: config::Plugin,
    compute: Compute,
    events: Events,
    node: watch::Sender<Option<Arc<Node>>>,
    health: watch::Sender<Health>,
) {
    let mut ticks = interval(HEALTH_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut watcher = Watcher {
        config,
        compute,
        events,
        taken: node,
        lock: None,
        prepared: None,
        last_outage: None,
    };
    let mut answered = None;
    loop {
        ticks.tick().await;
        let now = match watcher.check().await {
            Ok(healthy) => {
                answered = Some(Instant::now());
                healthy
            }
            Err(error)
                if is_busy(&*error) && answered.is_some_and(|at| at.elapsed() < BUSY_TIMEOUT) =>
            {
                continue;
            }
            Err(error) => {
                if !matches!(*health.borrow(), Health::Unhealthy { .. }) {
                    watcher.last_outage = SystemTime::now().duration_since(UNIX_EPOCH).ok();
                }
                Health::Unhealthy {
                    reason: chain(&*error),
                }
            }
        };
        health.send_if_modified(|health| {
            let changed = *health != now;
            if changed {
                tracing::info!(?now, "health");
                *health = now;
            }
            changed
        });
    }
}

/// Whether dockerd is there, and has only not answered in time.
fn is_busy(error: &(dyn Error + Send + Sync + 'static)) -> bool {
    let asked = match error.downcast_ref() {
        Some(node::Error::Docker(error)) => Some(error),
        _ => error.downcast_ref(),
    };
    matches!(asked, Some(docker::Error::TimedOut { .. }))
}

struct Watcher {
    config: config::Plugin,
    compute: Compute,
    events: Events,
    taken: watch::Sender<Option<Arc<Node>>>,
    lock: Option<Lock>,
    /// When the resources that slots need were last ensured; `None` after an outage of
    /// Docker.
    prepared: Option<Instant>,
    /// When the node last became unhealthy, since 1970. Nomad 1.11.3 tries a job that found no
    /// node again only on a node of another class, and a class is made of attributes, not of
    /// health (`applyUpsertNode` in nomad/fsm.go): this one changes with each outage.
    last_outage: Option<Duration>,
}

impl Watcher {
    async fn check(&mut self) -> Result<Health, Box<dyn Error + Send + Sync>> {
        let node = self.node()?;
        let asked = async {
            let prepared = self.prepared.filter(|at| at.elapsed() < BRIDGE_INTERVAL);
            if prepared.is_none() {
                node.prepare().await?;
            }
            let at = prepared.unwrap_or_else(Instant::now);
            Ok::<_, Box<dyn Error + Send + Sync>>((node.site.docker.about().await?, at))
        };
        let asked = asked.await;
        // A dockerd that was away may have lost the bridge, or may be a different dockerd.
        self.prepared = asked.as_ref().ok().map(|(_, at)| *at);
        let (about, _) = asked?;
        node.site.ready.send_replace(true);
        let mut guard = node.site.guard.subscribe();
        let open = guard.wait_for(|guard| *guard == Guard::Open);
        if timeout(GUARD_TIMEOUT, open).await.is_err()
            && let Guard::Closed { reason } = &*node.site.guard.borrow()
        {
            return Err(format!("the firewall's rules are not in force: {reason}").into());
        }
        let attribute = |name: &str, value: String| (format!("driver.polydev.{name}"), value);
        let config = &self.config;
        Ok(Health::Healthy {
            attributes: BTreeMap::from([
                attribute("version", env!("CARGO_PKG_VERSION").to_owned()),
                attribute("docker_version", about.version),
                attribute("cgroup_version", limits::cgroup_version().to_string()),
                attribute("runtimes", about.runtimes.join(",")),
                attribute("os_type", about.os_type),
                attribute("pids.limit", config.pids_limit.to_string()),
                attribute("privileged.enabled", config.allow.privileged.to_string()),
                attribute("volumes.enabled", config.volumes.to_string()),
                attribute("bandwidth", "1".into()),
                attribute(
                    "last_outage",
                    self.last_outage
                        .map_or("none".into(), |at| at.as_secs().to_string()),
                ),
                attribute("node_address", node.address()),
                attribute("node_identity", node.site.identity.clone()),
            ]),
        })
    }

    /// The node; takes charge of it first if necessary.
    fn node(&mut self) -> Result<Arc<Node>, Box<dyn Error + Send + Sync>> {
        if let Some(node) = self.taken.borrow().clone() {
            return Ok(node);
        }
        let held = match self.lock.take() {
            Some(held) => held,
            None => Lock::take(&self.config.state_dir).inspect_err(lock::Error::ask_to_leave)?,
        };
        match Node::take(self.config.clone(), self.compute, held, self.events.clone()) {
            Ok(node) => {
                self.taken.send_replace(Some(node.clone()));
                Ok(node)
            }
            Err((error, held)) => {
                self.lock = Some(held);
                Err(error.into())
            }
        }
    }
}
