//! What the driver holds while it is in charge of its node. There is at most one: [`start`]
//! creates it, with what [`recover`] recovers, and [`service`] serves shims.

mod recover;
pub mod service;
mod start;

pub use start::Error;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::sync::Mutex;

use crate::{
    config, firewall::Firewall, identity::LABEL_INSTANCE, run::book::Runs, sandbox::Networks,
    site::Site, slot::Slots, state::lock::Lock, task::Tasks, telemetry::Telemetry,
};

/// Contains a folder for each driver with a `socket_group`. It is not `/run/polydev`, which is a
/// shim's and ends with it.
const SOCKETS: &str = "/run/polydev-node";

/// The node that this process is in charge of.
#[derive(Debug)]
pub struct Node {
    pub site: Arc<Site>,
    pub runs: Arc<Runs>,
    pub slots: Arc<Slots>,
    pub tasks: Arc<Tasks>,
    pub networks: Arc<Networks>,
    pub telemetry: Telemetry,
    firewall: Firewall,
    /// Whether the bridge is still wanted. Held while it is made or removed, so that none is
    /// made after it was removed for good.
    wanted: Arc<Mutex<bool>>,
    _lock: Lock,
}

impl Node {
    /// Agrees on a version with Docker, and creates the slots' bridge, unless the driver
    /// [leaves](Self::leave).
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
        Ok(())
    }

    /// The address at which shims reach the node service.
    #[must_use]
    pub fn address(&self) -> String {
        let config = &self.site.config;
        if let Some(shims) = &config.shims {
            return shims.advertise.clone();
        }
        let path = socket_path(config, &self.site.instance);
        format!("unix://{}", path.display())
    }

    /// Removes what only a driver with slots needs. Bounded by the deadlines of calls of Docker and
    /// of the firewall's programs.
    pub async fn leave(&self) {
        let Site {
            config,
            docker,
            instance,
            name,
            broker,
            ..
        } = &*self.site;
        broker.leave();
        let path = socket_path(config, instance);
        let _gone = std::fs::remove_file(&path);
        if let Some(folder) = path.parent().filter(|_| config.socket_group.is_some()) {
            let _another_life = std::fs::remove_dir(folder);
        }
        let mut slots = self.slots.book.all().into_iter();
        if self.runs.going() > 0 || slots.any(|slot| slot.end().is_none()) {
            return;
        }
        self.runs.leave();
        self.tasks.leave();
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

/// Where the node service listens. Only root reaches what is in the state folder, so a socket for
/// a group is elsewhere.
fn socket_path(config: &config::Plugin, instance: &str) -> PathBuf {
    let folder = match config.socket_group {
        Some(_) => Path::new(SOCKETS).join(instance),
        None => config.state_dir.clone(),
    };
    folder.join("node.sock")
}
