//! Which containers have something new for the driver. What it is, is read when it is sent: so
//! nothing is lost while the driver is away, and however much happens, there is one message for
//! each container.

use std::collections::VecDeque;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// The names of the containers, in the order in which they came; each once.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    names: Mutex<VecDeque<String>>,
    added: Notify,
}

impl Changes {
    pub(crate) fn add(&self, container: &str) {
        let mut names = self.names.lock();
        if !names.iter().any(|known| known == container) {
            names.push_back(container.to_owned());
        }
        drop(names);
        self.added.notify_one();
    }

    /// The next one, for one caller at a time.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub(crate) async fn next(&self) -> String {
        loop {
            if let Some(container) = self.names.lock().pop_front() {
                return container;
            }
            self.added.notified().await;
        }
    }
}
