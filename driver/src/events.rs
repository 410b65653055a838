//! Task events: what an operator sees in `nomad alloc status`. Nomad keeps ten of
//! a task, and each is a write to its servers, so that only start, image, limits
//! and faults are told here; claims and refills are not.

use std::time::SystemTime;

use polydev_proto::driver::DriverTaskEvent;
use tokio::sync::broadcast;

use crate::identity::Identity;

/// Events that wait for the agent to read them; the oldest are dropped beyond.
const MAX_WAITING: usize = 256;

/// Fans events out to whoever listens.
#[derive(Debug, Clone)]
pub struct Events {
    sender: broadcast::Sender<DriverTaskEvent>,
}

impl Events {
    #[must_use]
    pub fn new() -> Self {
        Self {
            sender: broadcast::Sender::new(MAX_WAITING),
        }
    }

    /// Tells one sentence about a task; nobody has to listen.
    pub fn send(&self, task: &Identity, message: String) {
        tracing::info!(alloc_id = task.alloc_id, message);
        let _nobody_listens = self.sender.send(DriverTaskEvent {
            task_id: task.task_id.clone(),
            alloc_id: task.alloc_id.clone(),
            task_name: task.task_name.clone(),
            timestamp: Some(SystemTime::now().into()),
            message,
            annotations: Default::default(),
        });
    }

    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<DriverTaskEvent> {
        self.sender.subscribe()
    }
}

impl Default for Events {
    fn default() -> Self {
        Self::new()
    }
}
