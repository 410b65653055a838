//! The connection to one container's init, and who is in that container.

use std::{path::PathBuf, time::Duration};

use polydev_proto::init::{Release, to_init};
use tokio::time::timeout;

use super::{Link, Listener};
use crate::{docker::Docker, process::Held};

/// How long init of a slot's container may take to end after SIGKILL, before the driver asks
/// Docker to remove the container.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// A slot's container, as the journal records it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Occupant {
    pub container: String,
    /// Process 1 of the container by its number on the host, and its start time according
    /// to the kernel.
    pub pid: u32,
    pub pid_start: u64,
    /// The folder of its socket.
    pub link: PathBuf,
}

/// The connection to one container's init.
#[derive(Debug)]
pub(crate) struct Connection {
    /// Owns the folder that is mounted into the container.
    pub(crate) listener: Listener,
    pub(crate) init: Held,
    pub(crate) pid: u32,
    /// `None` until init has reconnected.
    pub(crate) link: Option<Link>,
}

impl Connection {
    /// Ends init and so everything in its container, which frees its CPU and memory. If
    /// init cannot be killed, for example in a paused container, Docker must remove the
    /// container; the driver retries until it has.
    ///
    /// # Cancel safety
    /// The end that was started continues.
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
