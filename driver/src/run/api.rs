//! What the broker has seen of a run: tokens and errors of APIs, whether the run should end
//! because of them, and what else it has connected to.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use polydev_proto::broker::{ApiError, Destination, ModelUsage, Seen};

use super::{Ended, Progress, Run, cancel::Cause};

/// Most errors that a message names.
const MAX_ERRORS: usize = 10;

/// All of it, from the start of the run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answers {
    pub(crate) usage: Vec<ModelUsage>,
    pub(crate) errors: Vec<ApiError>,
    /// What it has connected to, and what it was not allowed to.
    pub(crate) egress: Vec<Destination>,
    /// Since when an API has been overloaded, or not reached.
    overloaded: Option<Instant>,
}

impl Answers {
    /// All that a run has had.
    pub(super) fn of(ended: &Ended) -> Self {
        Self {
            usage: ended.usage.clone(),
            errors: ended.api_errors.clone(),
            egress: ended.egress.clone(),
            overloaded: None,
        }
    }
}

impl From<Seen> for Answers {
    fn from(seen: Seen) -> Self {
        let overloaded = seen.overloaded_ms.map(Duration::from_millis);
        Self {
            usage: seen.usage,
            errors: seen.errors,
            egress: seen.destinations,
            overloaded: overloaded.and_then(|ago| Instant::now().checked_sub(ago)),
        }
    }
}

impl Progress {
    /// As far as they are known.
    pub(super) fn answers(&self) -> Arc<Answers> {
        self.answers.clone().unwrap_or_default()
    }
}

impl Run {
    /// When the run should end because an API is overloaded; `None` if none is, or the run has
    /// no limit.
    pub(super) fn api_deadline(&self) -> Option<Instant> {
        let overloaded = self.progress.borrow().answers.as_ref()?.overloaded?;
        overloaded.checked_add(self.claimed.max_api_wait?)
    }

    /// The end of a run that has waited too long for an API.
    pub(super) fn api_unavailable(&self) -> Cause {
        let waited = self.claimed.max_api_wait.unwrap_or_default();
        let answers = self.progress.borrow().answers();
        let errors = answers.errors.iter().take(MAX_ERRORS).map(words);
        let errors: Vec<String> = errors.collect();
        Cause::ApiUnavailable(format!(
            "an API was overloaded for {}: {}",
            humantime::format_duration(waited),
            errors.join(", ")
        ))
    }
}

fn words(error: &ApiError) -> String {
    let ApiError {
        provider,
        status,
        count,
    } = error;
    match status {
        0 => format!("{provider} could not be reached ({count})"),
        _ => format!("{provider} answered with status {status} ({count})"),
    }
}
