//! What the driver holds while it is in charge of its node. There is at most one: [`start`]
//! creates it, with what [`recover`] recovers, and [`service`] serves shims.

mod recover;
pub mod service;
mod start;

pub use start::Error;

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use tokio::sync::Mutex;

use crate::{
    config, firewall::Firewall, identity::LABEL_INSTANCE, metrics::Metrics, run::book::Runs,
    sandbox::Networks, site::Site, slot::Slots, state::lock::Lock, task::Tasks,
};

/// The node that this process is in charge of.
#[derive(Debug)]
pub struct Node {
    pub site: Arc<Site>,
    pub runs: Arc<Runs>,
    pub slots: Arc<Slots>,
    pub tasks: Arc<Tasks>,
    pub networks: Arc<Networks>,
    pub metrics: Metrics,
    firewall: Firewall,
    /// Whether the bridge is still wanted. Held while it is made or removed, so that none is
    /// made after it was removed for good.
    wanted: Mutex<bool>,
    _lock: Lock,
}

impl Node {
    /// Agrees on a version with Docker, and creates the slots' bridge and its firewall rules,
    /// unless the driver [leaves](Self::leave).
    ///
    /// # Errors
    /// [`Error`]; the caller tries again.
    pub async fn prepare(&self) -> Result<(), Error> {
        let Site {
            docker,
            instance,
            name,
            ..
        } = &*self.site;
        docker.negotiate().await?;
        let wanted = self.wanted.lock().await;
        if !*wanted {
            return Ok(());
        }
        let labels = HashMap::from([(LABEL_INSTANCE.to_owned(), instance.clone())]);
        docker
            .ensure_bridge(name, &interface(instance), &labels)
            .await?;
        Ok(self.firewall.ensure().await?)
    }

    /// The address at which shims reach the node service.
    #[must_use]
    pub fn address(&self) -> String {
        let config = &self.site.config;
        if let Some(shims) = &config.shims {
            return shims.advertise.clone();
        }
        format!("unix://{}", socket_path(config).display())
    }

    /// Removes what only a driver with slots needs. Bounded by the deadlines of Docker calls.
    pub async fn leave(&self) {
        let Site {
            config,
            docker,
            name,
            broker,
            ..
        } = &*self.site;
        broker.leave();
        let _gone = std::fs::remove_file(socket_path(config));
        let mut slots = self.slots.book.all().into_iter();
        if self.runs.going() > 0 || slots.any(|slot| slot.end().is_none()) {
            return;
        }
        self.runs.leave();
        let mut wanted = self.wanted.lock().await;
        *wanted = false;
        match docker.remove_bridge(name).await {
            Ok(()) => self.firewall.remove().await,
            Err(error) => {
                tracing::info!(error = crate::chain(&error), "cannot remove the bridge");
            }
        }
    }
}

/// The bridge's interface name; the kernel allows 15 letters.
fn interface(instance: &str) -> String {
    format!("pd-{instance}")
}

fn socket_path(config: &config::Plugin) -> PathBuf {
    config.state_dir.join("node.sock")
}
