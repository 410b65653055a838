//! The name of a container that an attempt may still hold which failed or was cut off.

use std::{iter, time::Duration};

use polydev_transport::backoff::Backoff;

use super::{Docker, Error};
use crate::identity::LABEL_INSTANCE;

/// With the waits below, 13 to 27 s: an overloaded dockerd takes seconds to create a
/// container.
const MAX_ATTEMPTS: usize = 30;
const FIRST_INTERVAL: Duration = Duration::from_millis(50);
const MAX_INTERVAL: Duration = Duration::from_secs(1);

/// Who has a name that is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// No container has it yet, or any more. Docker reserves a name before the container
    /// exists, and frees it after the container is gone.
    Nobody,
    /// A container of this driver.
    Ours,
    Other,
}

impl Docker {
    /// Who has a name that Docker says is in use.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn holder(&self, name: &str, instance: &str) -> Result<Holder, Error> {
        match self.labels(name).await {
            Ok(labels) if labels.get(LABEL_INSTANCE).is_some_and(|of| of == instance) => {
                Ok(Holder::Ours)
            }
            Ok(_) => Ok(Holder::Other),
            Err(error) if error.is_not_found() => Ok(Holder::Nobody),
            Err(error) => Err(error),
        }
    }
}

/// The waits between the attempts to create a container whose name is in use.
pub(crate) fn waits() -> impl Iterator<Item = Duration> {
    let mut backoff = Backoff::new(FIRST_INTERVAL, MAX_INTERVAL);
    iter::repeat_with(move || backoff.next_wait()).take(MAX_ATTEMPTS)
}
