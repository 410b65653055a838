//! What runs refresh of the accounts that they signed in with: sealed to the shims, which this
//! driver cannot open. It is kept for as long as a run's results, and told to every shim that
//! listens: which of them has the store is not known here.

use std::sync::Arc;

use polydev_proto::init::{MAX_REFRESHED, Refreshed};
use tokio::sync::broadcast;

use super::{Run, book::Runs};

/// A file's longest, with what sealing adds, and the label.
const MOST: usize = MAX_REFRESHED + 2048;

impl Runs {
    /// Keeps what a run has told, in place of what it told before.
    pub(super) fn refreshed(&self, run: &Run, refreshed: &Refreshed) {
        let run_id = &run.claimed.run_id;
        if refreshed.sealed.len() + refreshed.label.len() > MOST {
            return tracing::warn!(run_id, "a refreshed account is longer than any");
        }
        tracing::debug!(run_id, "an account was refreshed");
        run.refreshed.keep(refreshed);
        // Often nobody listens.
        let _listeners = self.refreshed.send(run_id.clone());
    }

    /// The id of each run that tells something, from now on.
    pub fn watch_refreshed(&self) -> broadcast::Receiver<String> {
        self.refreshed.subscribe()
    }

    /// The runs of which something is kept.
    pub fn all_refreshed(&self) -> Vec<Arc<Run>> {
        let mut runs = self.all(|_| true);
        runs.retain(|run| run.refreshed.is_kept());
        runs
    }
}

impl Run {
    /// What it told last.
    pub fn refreshed(&self) -> Option<Refreshed> {
        self.refreshed.read()
    }
}
