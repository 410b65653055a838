//! The way to one container's init, and who is in that container.

use std::{path::PathBuf, time::Duration};

use polydev_proto::init::{Release, to_init};
use tokio::time::timeout;

use super::{Link, Listener};
use crate::{docker::Docker, process::Held};

/// For an init that is killed to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// A slot's container, as the journal must have it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Occupant {
    pub container: String,
    /// Process 1 of the container by its number on the host, and its start time in the
    /// kernel's words.
    pub pid: u32,
    pub pid_start: u64,
    /// The folder of its socket.
    pub link: PathBuf,
}

/// The way to one container's init.
#[derive(Debug)]
pub(crate) struct Connection {
    /// Keeps the folder that is mounted into the container.
    pub(crate) listener: Listener,
    pub(crate) init: Held,
    pub(crate) pid: u32,
    /// `None` until init is back.
    pub(crate) link: Option<Link>,
}

impl Connection {
    /// Ends init, and with it everything in its container, whose CPU and memory are free
    /// then. Docker removes one that cannot be killed, for example in a paused container;
    /// it is asked until it has.
    ///
    /// # Cancel safety
    /// What was begun continues.
    pub(crate) async fn end(&mut self, docker: &Docker, container: &str) {
        if let Some(link) = &mut self.link {
            let released = to_init::Message::Release(Release {});
            let _gone = link.writer.send(released).await;
        }
        self.init.kill();
        while timeout(KILL_TIMEOUT, self.init.ended()).await.is_err() {
            tracing::warn!(container, "init cannot be killed, asking dockerd");
            if let Err(error) = docker.remove(container).await {
                let error = crate::chain(&error);
                tracing::warn!(container, error, "cannot remove a container yet");
            }
        }
    }
}
