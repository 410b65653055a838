//! Which containers have something new for the driver. What it is, is read when it is sent: so
//! nothing is lost while the driver is away, and however much happens, there is one message for
//! each container.

use std::collections::BTreeSet;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// The names of the containers.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    names: Mutex<BTreeSet<String>>,
    added: Notify,
}

impl Changes {
    pub(crate) fn add(&self, container: &str) {
        self.names.lock().insert(container.to_owned());
        self.added.notify_one();
    }

    /// The next one, for one caller at a time.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub(crate) async fn next(&self) -> String {
        loop {
            if let Some(container) = self.names.lock().pop_first() {
                return container;
            }
            self.added.notified().await;
        }
    }
}
