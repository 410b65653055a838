//! What every part of the driver may use of its node: the options, Docker, images, task
//! events, and the names and folders that containers are made with.
//!
//! It decides nothing, and knows neither slots nor tasks nor runs.

use std::{path::PathBuf, sync::Arc};

use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::{config, docker::Docker, events::Events, images::Images};

/// The node's place, as this life of the driver found it.
#[derive(Debug)]
pub struct Site {
    pub config: config::Plugin,
    pub docker: Docker,
    pub images: Arc<Images>,
    pub events: Events,
    /// Random, made once for a state folder. Containers and networks of this driver carry it.
    pub instance: String,
    /// Random, made at each start. A claim names the start that its shim saw.
    pub start_id: String,
    /// Name of the Docker network, and first part of every container's name.
    pub name: String,
    /// The init program, named by its content.
    pub init: PathBuf,
    /// Holds a folder with a socket for each container.
    pub link_dir: PathBuf,
    /// The file that containers of slots get as `/etc/resolv.conf`.
    pub resolv_conf: PathBuf,
    pub compute: Compute,
    /// True once Docker has answered and the rules of the slots' bridge are in force.
    pub ready: watch::Sender<bool>,
    /// Everything that runs in the background.
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
    /// Nomad turns a percentage of a core into ticks with this figure.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "MHz are far below 2^52")]
    pub fn mhz_of_a_core(&self) -> f64 {
        self.mhz as f64 / self.cores.max(1) as f64
    }
}
