//! What is told of runs to whoever looks on: how far each has come, without its output.

use std::{sync::Arc, time::Duration};

use polydev_proto::stream::Stream;

use super::{Ended, Outcome, Run, book::Runs, journal::Claimed};

/// One run at one moment.
#[derive(Debug)]
pub struct Summary {
    pub run: Arc<Run>,
    pub state: State,
    /// From the claim to the command's process; `None` until then.
    pub started: Option<Duration>,
    pub ended: Option<Ended>,
    /// So far.
    pub stdout_bytes: u64,
    /// So far.
    pub stderr_bytes: u64,
    pub cancelled: bool,
}

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Claimed,
    Running,
    Ended,
}

/// Which runs: those that fit all of it.
#[derive(Debug, Default)]
pub struct Filter {
    pub user_id: Option<String>,
    pub provider: Option<String>,
    /// Any, if there are none.
    pub states: Vec<State>,
    /// Those with a lesser id.
    pub before: Option<String>,
}

impl Filter {
    /// Whether a run does, however far it has come.
    pub fn fits(&self, claimed: &Claimed) -> bool {
        let is = |wanted: &Option<String>, given: &str| {
            wanted.as_ref().is_none_or(|wanted| wanted == given)
        };
        is(&self.user_id, &claimed.user_id)
            && is(&self.provider, &claimed.provider)
            && self
                .before
                .as_ref()
                .is_none_or(|before| claimed.run_id < *before)
    }
}

impl Runs {
    /// The `limit` last runs that fit, the last one first.
    pub fn list(&self, filter: &Filter, limit: usize) -> Vec<Summary> {
        let mut runs = self.all(|run| filter.fits(&run.claimed));
        runs.sort_unstable_by(|a, b| b.claimed.run_id.cmp(&a.claimed.run_id));
        let fits = |state| filter.states.is_empty() || filter.states.contains(&state);
        runs.into_iter()
            .filter_map(Run::summary)
            .filter(|summary| fits(summary.state))
            .take(limit)
            .collect()
    }
}

impl Run {
    /// How far it has come; `None` if nothing of it ran.
    pub fn summary(self: Arc<Self>) -> Option<Summary> {
        let (started, ended) = {
            let progress = self.progress.borrow();
            let ended = match &progress.outcome {
                Some(Outcome::Ended(ended)) => Some(ended.clone()),
                Some(Outcome::Aborted(_)) => return None,
                None => None,
            };
            (progress.started, ended)
        };
        let state = match (&ended, started) {
            (Some(_), _) => State::Ended,
            (None, Some(_)) => State::Running,
            (None, None) => State::Claimed,
        };
        let written = |stream| self.output[stream].end();
        let (stdout_bytes, stderr_bytes) = (written(Stream::Stdout), written(Stream::Stderr));
        let cancelled = self.cancel.reason().is_some();
        Some(Summary {
            run: self,
            state,
            started,
            ended,
            stdout_bytes,
            stderr_bytes,
            cancelled,
        })
    }
}
