//! What runs refresh of the accounts that they signed in with: sealed to the shims, which this
//! driver cannot open. It is kept for as long as a run's results, and told to every shim that
//! listens: which of them has the store is not known here.

use std::sync::Arc;

use bytes::Bytes;
use polydev_proto::init::{MAX_LABEL, MAX_REFRESHED, Refreshed};
use tokio::sync::broadcast;

use super::{Run, book::Runs};

/// A file's longest, with what protobuf and sealing add.
const MAX_SEALED: usize = MAX_REFRESHED + 100;

impl Runs {
    /// Keeps what a run has told, in place of what it told before.
    pub(super) fn refreshed(&self, run: &Run, refreshed: &Refreshed) {
        let run_id = &run.claimed.run_id;
        if refreshed.sealed.len() > MAX_SEALED || refreshed.label.len() > MAX_LABEL {
            return tracing::warn!(run_id, "a refreshed account is longer than any");
        }
        tracing::debug!(run_id, "an account was refreshed");
        // Slices of what was read from init would keep all of it.
        let refreshed = Refreshed {
            label: Bytes::copy_from_slice(&refreshed.label),
            sealed: Bytes::copy_from_slice(&refreshed.sealed),
        };
        run.refreshed.keep(&refreshed);
        run.update(|progress| progress.refreshed = Some(refreshed));
        // Often nobody listens.
        let _listeners = self.refreshed.send(run_id.clone());
    }

    /// The id of each run that tells something, from now on.
    pub fn watch_refreshed(&self) -> broadcast::Receiver<String> {
        self.refreshed.subscribe()
    }

    /// The runs of which something is kept.
    pub fn all_refreshed(&self) -> Vec<Arc<Run>> {
        self.all(|run| run.progress.borrow().refreshed.is_some())
    }
}

impl Run {
    /// What it told last.
    pub fn refreshed(&self) -> Option<Refreshed> {
        self.progress.borrow().refreshed.clone()
    }
}
