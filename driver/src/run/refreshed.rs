//! Accounts that runs have refreshed, sealed to the shims, so this driver cannot open them.
//! The driver keeps them as long as a run's results and sends them to every shim that
//! listens, because it does not know which of them has the store.

use std::sync::Arc;

use bytes::Bytes;
use polydev_proto::{
    id::RunId,
    init::{MAX_LABEL, MAX_REFRESHED, Refreshed},
};
use tokio::sync::broadcast;

use super::{Run, book::Runs};

/// Largest file, plus what protobuf and sealing add.
const MAX_SEALED: usize = MAX_REFRESHED + 100;

impl Runs {
    /// Keeps a refreshed account; it replaces the run's previous one.
    pub(super) fn refreshed(&self, run: &Run, refreshed: &Refreshed) {
        let run_id = run.claimed.run_id;
        if refreshed.sealed.len() > MAX_SEALED || refreshed.label.len() > MAX_LABEL {
            return tracing::warn!(%run_id, "ignoring a refreshed account that is too long");
        }
        tracing::debug!(%run_id, "an account was refreshed");
        // Slices of init's message would keep the whole message in memory.
        let refreshed = Refreshed {
            label: Bytes::copy_from_slice(&refreshed.label),
            sealed: Bytes::copy_from_slice(&refreshed.sealed),
        };
        run.refreshed.keep(&refreshed);
        run.update(|progress| progress.refreshed = Some(refreshed));
        // Often there is no listener.
        let _listeners = self.refreshed.send(run_id);
    }

    /// The id of each run that refreshes an account, from now on.
    pub fn watch_refreshed(&self) -> broadcast::Receiver<RunId> {
        self.refreshed.subscribe()
    }

    /// The runs with a refreshed account.
    pub fn all_refreshed(&self) -> Vec<Arc<Run>> {
        self.all(|run| run.progress.borrow().refreshed.is_some())
    }
}

impl Run {
    /// The last refreshed account.
    pub fn refreshed(&self) -> Option<Refreshed> {
        self.progress.borrow().refreshed.clone()
    }
}
