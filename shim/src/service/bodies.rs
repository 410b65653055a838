//! The memory for requests that are being read, of all callers together.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::run::Error;

/// Most bytes of all bodies.
const MAX_BODIES: usize = 64 << 20;
/// The longest part that has no share. A short request is not held up by others: an end of a run,
/// for example, or a piece of 64 KiB of a run's input.
pub(super) const MAX_SHORT: usize = 65 << 10;
/// What a permit stands for.
const KIB: usize = 1 << 10;

/// The memory; clones share it.
#[derive(Debug, Clone)]
pub(super) struct Bodies(Arc<Semaphore>);

/// The part of one body, which is given back when this is dropped.
pub(super) struct Share {
    of: Arc<Semaphore>,
    held: OwnedSemaphorePermit,
}

impl Bodies {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(MAX_BODIES / KIB)))
    }

    /// # Errors
    /// [`Error::Busy`]
    pub(super) fn share(&self) -> Result<Share, Error> {
        let of = self.0.clone();
        let held = of.clone().try_acquire_owned();
        held.map(|held| Share { of, held }).map_err(|_| Error::Busy)
    }
}

impl Share {
    /// Makes room for a body of so many bytes.
    ///
    /// # Errors
    /// [`Error::Busy`]
    pub(super) fn grow_to(&mut self, bytes: usize) -> Result<(), Error> {
        let more = (bytes / KIB + 1).saturating_sub(self.held.num_permits());
        let more = u32::try_from(more).map_err(|_| Error::Busy)?;
        let more = self.of.clone().try_acquire_many_owned(more);
        self.held.merge(more.map_err(|_| Error::Busy)?);
        Ok(())
    }
}
