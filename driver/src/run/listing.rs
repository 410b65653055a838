//! Summaries of runs for lists and watchers: their progress, without their output.

use std::{cmp::Reverse, sync::Arc, time::Duration};

use polydev_proto::{
    id::{RunId, UserId},
    stream::Stream,
};

use super::{Ended, Outcome, Run, api::Answers, book::Runs, journal::Claimed};

/// One run at one moment.
#[derive(Debug)]
pub struct Summary {
    pub run: Arc<Run>,
    pub state: State,
    /// Time from the claim to the start of the command's process; `None` before that.
    pub started: Option<Duration>,
    pub ended: Option<Ended>,
    /// So far.
    pub stdout_bytes: u64,
    /// So far.
    pub stderr_bytes: u64,
    pub cancelled: bool,
    /// So far.
    pub(crate) answers: Arc<Answers>,
}

/// The progress of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Claimed,
    Running,
    Ended,
}

/// A filter for runs; all conditions must hold.
#[derive(Debug, Default)]
pub struct Filter {
    pub user_id: Option<UserId>,
    pub provider: Option<String>,
    /// Empty allows every state.
    pub states: Vec<State>,
    /// Only runs with a lower id.
    pub before: Option<RunId>,
}

impl Filter {
    /// Whether a run matches, regardless of its state.
    pub fn fits(&self, claimed: &Claimed) -> bool {
        fn is<T: PartialEq>(wanted: Option<&T>, given: &T) -> bool {
            wanted.is_none_or(|wanted| wanted == given)
        }
        is(self.user_id.as_ref(), &claimed.user_id)
            && is(self.provider.as_ref(), &claimed.provider)
            && self.before.is_none_or(|before| claimed.run_id < before)
    }
}

impl Runs {
    /// The latest `limit` runs that match, the latest first.
    pub fn list(&self, filter: &Filter, limit: usize) -> Vec<Summary> {
        let mut runs = self.all(|run| filter.fits(&run.claimed));
        runs.sort_unstable_by_key(|run| Reverse(run.claimed.run_id));
        let fits = |state| filter.states.is_empty() || filter.states.contains(&state);
        runs.into_iter()
            .filter_map(Run::summary)
            .filter(|summary| fits(summary.state))
            .take(limit)
            .collect()
    }
}

impl Run {
    /// A summary; `None` if the command never ran.
    pub fn summary(self: Arc<Self>) -> Option<Summary> {
        let (started, ended, answers) = {
            let progress = self.progress.borrow();
            let ended = match &progress.outcome {
                Some(Outcome::Ended(ended)) => Some(ended.clone()),
                Some(Outcome::Aborted(_)) => return None,
                None => None,
            };
            (progress.started, ended, progress.answers())
        };
        let state = match (&ended, started) {
            (Some(_), _) => State::Ended,
            (None, Some(_)) => State::Running,
            (None, None) => State::Claimed,
        };
        let written = |stream| self.output[stream].end();
        let (stdout_bytes, stderr_bytes) = (written(Stream::Stdout), written(Stream::Stderr));
        let cancelled = self.cancel.cause().is_some();
        Some(Summary {
            run: self,
            state,
            started,
            ended,
            stdout_bytes,
            stderr_bytes,
            cancelled,
            answers,
        })
    }
}
