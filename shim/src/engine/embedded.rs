//! Everything on this machine, with Docker but without Nomad. It launches the driver binary as a
//! Nomad agent does, and keeps the pools itself. For trials and tests; a cluster needs Nomad.

pub mod plugin;
pub mod pools;

pub use plugin::Error;

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use polydev_proto::provider::{Provider, Vendor};
use tokio::{sync::watch, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use super::{At, Expected};
use plugin::Plugin;

/// Time for a run's kill timeout and the removal of its container.
const STOP_TIMEOUT: Duration = Duration::from_secs(40);

/// What to start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The driver's program.
    pub driver: PathBuf,
    /// The driver's own folder.
    pub state_dir: PathBuf,
    /// Warm slots of each provider.
    pub pools: Vec<(Provider, u32)>,
    /// Where the model requests of a pool go, in place of the provider's own API.
    pub base_urls: BTreeMap<Vendor, String>,
    /// What the containers of a pool may reach, if not what is usual for its provider.
    pub egress: BTreeMap<Provider, Vec<String>>,
    /// Whether the CLIs wait in the slots for prompts.
    pub agents: bool,
    /// Whether the calls of their tools wait for a decision.
    pub tool_policy: bool,
}

/// A driver that this process has launched, with its pools.
pub struct Engine {
    plugin: Plugin,
    node_id: String,
    address: String,
    slots: TaskTracker,
    stop: CancellationToken,
}

impl Engine {
    /// Launches the driver and starts to fill the pools.
    ///
    /// # Errors
    /// [`Error`]; nothing is left running.
    pub async fn start(settings: &Settings) -> Result<Self, Error> {
        let mut plugin = Plugin::launch(&settings.driver, &settings.state_dir).await?;
        let address = match plugin.healthy().await {
            Ok(address) => address,
            Err(error) => {
                plugin.shutdown().await;
                return Err(error);
            }
        };
        let engine = Self {
            plugin,
            node_id: Uuid::new_v4().to_string(),
            address,
            slots: TaskTracker::new(),
            stop: CancellationToken::new(),
        };
        for (provider, count) in &settings.pools {
            for _ in 0..*count {
                let vendor = provider.vendor().ok();
                let base_url = vendor.and_then(|vendor| settings.base_urls.get(&vendor));
                let options = pools::Options {
                    base_url: base_url.cloned(),
                    egress: settings.egress.get(provider).cloned(),
                    agent: settings.agents,
                    tool_policy: settings.tool_policy && vendor.is_some(),
                };
                let slot = pools::Slot::new(*provider, &engine.node_id, options);
                let driver = engine.plugin.driver();
                engine.slots.spawn(slot.keep(driver, engine.stop.clone()));
            }
        }
        Ok(engine)
    }

    /// The only driver, for [`pool::follow`](crate::pool::follow).
    #[must_use]
    pub fn drivers(&self) -> watch::Receiver<BTreeMap<String, At>> {
        let at = At {
            address: self.address.clone(),
            expected: Expected::Any,
        };
        let drivers = BTreeMap::from([(self.node_id.clone(), at)]);
        // Nothing changes, but the receiver can wait only while the sender lives.
        let (sender, receiver) = watch::channel(drivers);
        self.slots.spawn({
            let stop = self.stop.clone();
            async move {
                stop.cancelled().await;
                drop(sender);
            }
        });
        receiver
    }

    /// Waits until the driver ends, which it should not do, and returns how it ended.
    pub async fn driver_died(&mut self) -> String {
        self.plugin.died().await
    }

    /// Stops the slots and then the driver. Only images are left.
    pub async fn stop(self) {
        self.stop.cancel();
        self.slots.close();
        if timeout(STOP_TIMEOUT, self.slots.wait()).await.is_err() {
            tracing::warn!("some slots did not stop in time");
        }
        self.plugin.shutdown().await;
    }
}
