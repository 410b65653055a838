//! Task events, as `nomad alloc status` shows them. Nomad keeps ten per task and writes
//! each to its servers. So the driver sends only start, image, limit and fault events, and
//! none for claims and refills.

use std::time::SystemTime;

use polydev_proto::driver::DriverTaskEvent;
use tokio::sync::broadcast;

use crate::identity::Identity;

/// Most events that wait for the agent to read them; beyond it the oldest are dropped.
const MAX_WAITING: usize = 256;

/// Distributes events to all listeners.
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

    /// Sends an event about a task. There may be no listener.
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
