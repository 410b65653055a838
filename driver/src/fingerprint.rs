//! Is this node able to run slots, and if not, why? One task finds out, takes
//! charge of the node as soon as it can, and publishes what it finds.

use std::{collections::BTreeMap, error::Error, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};

use crate::{
    chain, config,
    events::Events,
    limits,
    node::{Node, lock::Lock},
};

const EVERY: Duration = Duration::from_secs(2);

/// What Nomad is told about the driver on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Not configured yet: no agent has really started this process.
    Unconfigured,
    Unhealthy {
        reason: String,
    },
    Healthy {
        attributes: BTreeMap<String, String>,
    },
}

/// Watches Docker and the state folder for ever.
pub async fn run(
    config: config::Plugin,
    events: Events,
    node: watch::Sender<Option<Arc<Node>>>,
    health: watch::Sender<Health>,
) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut lock = None;
    loop {
        ticks.tick().await;
        let now = check(&config, &events, &node, &mut lock)
            .await
            .unwrap_or_else(|error| Health::Unhealthy {
                reason: chain(&*error),
            });
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

async fn check(
    config: &config::Plugin,
    events: &Events,
    taken: &watch::Sender<Option<Arc<Node>>>,
    lock: &mut Option<Lock>,
) -> Result<Health, Box<dyn Error + Send + Sync>> {
    let node = taken.borrow().clone();
    let node = match node {
        Some(node) => node,
        None => {
            let held = match lock.take() {
                Some(held) => held,
                None => Lock::take(&config.state_dir)?,
            };
            match Node::take(config.clone(), held, events.clone()).await {
                Ok(node) => {
                    taken.send_replace(Some(node.clone()));
                    node
                }
                Err((error, held)) => {
                    *lock = Some(held);
                    return Err(error.into());
                }
            }
        }
    };
    let docker_version = node.docker.version().await?;
    let attribute = |name: &str, value: String| (format!("driver.polydev.{name}"), value);
    Ok(Health::Healthy {
        attributes: BTreeMap::from([
            attribute("version", env!("CARGO_PKG_VERSION").to_owned()),
            attribute("docker_version", docker_version),
            attribute("cgroup_version", limits::cgroup_version().to_string()),
            attribute("node_address", node.address()),
        ]),
    })
}
