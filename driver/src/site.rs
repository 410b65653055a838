//! What every part of the driver shares: the options, Docker, images, task events, and the
//! names and folders for containers.
//!
//! It decides nothing, and knows no slots, tasks or runs.

use std::{path::PathBuf, sync::Arc};

use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::{
    broker::Broker, config, docker::Docker, events::Events, firewall::Guard, images::Images,
    permits::Permits,
};

/// What the parts of the driver share.
#[derive(Debug)]
pub struct Site {
    pub config: config::Plugin,
    pub docker: Docker,
    pub images: Arc<Images>,
    pub events: Events,
    pub broker: Arc<Broker>,
    pub permits: Permits,
    /// Random, created once per state folder. Containers and networks of this driver carry it.
    pub instance: String,
    /// Of this node, for shims.
    pub identity: String,
    /// Random, created at each start. A claim names the start that its shim saw.
    pub start_id: String,
    /// Name of the Docker network, and prefix of the names of slots' containers.
    pub name: String,
    /// The init program, named after its content.
    pub init: PathBuf,
    /// Contains a folder with a socket for each container.
    pub link_dir: PathBuf,
    /// The file mounted as `/etc/resolv.conf` into containers of slots.
    pub resolv_conf: PathBuf,
    pub compute: Compute,
    /// True once Docker has responded, and the slots' bridge was there.
    pub ready: watch::Sender<bool>,
    /// Whether the rules of the slots' bridge are in force.
    pub guard: watch::Sender<Guard>,
    /// Background tasks.
    pub background: TaskTracker,
}

/// The node's CPUs, as Nomad counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compute {
    /// All cores together.
    pub mhz: i64,
    pub cores: i64,
}

impl Compute {
    /// Nomad uses this value to convert a percentage of a core into ticks.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "MHz are far below 2^52")]
    pub fn mhz_of_a_core(&self) -> f64 {
        self.mhz as f64 / self.cores.max(1) as f64
    }
}
