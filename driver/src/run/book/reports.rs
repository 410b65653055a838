//! What the broker reports of runs.

use polydev_proto::broker::{ApiError, Seen};

use super::Runs;
use crate::run::{Run, api::Answers, cancel::Cause, journal::Claimed};

impl Runs {
    /// The broker has reported what it has seen of a run, which may have ended long ago.
    pub(crate) fn seen(&self, seen: Seen) {
        tracing::debug!(run_id = seen.run_id, errors = ?seen.errors, "the APIs have answered");
        let run_id = seen.run_id.parse().ok();
        if let Some(run) = run_id.and_then(|run_id| self.find(run_id, None).ok()) {
            self.answered(&run, seen);
        }
    }

    /// Takes over what the broker has seen of a run.
    pub(crate) fn answered(&self, run: &Run, seen: Seen) {
        let (refused, over_budget) = (seen.refused.clone(), seen.over_budget.clone());
        let Claimed {
            run_id, user_id, ..
        } = &run.claimed;
        let mut has_spent = false;
        run.update(|progress| {
            // What is reported after the end is of no day.
            has_spent = progress.outcome.is_none() && self.spent.saw(*run_id, user_id, &seen);
            let answers = Answers::from(seen);
            // What an earlier life of the driver has counted is not counted again.
            if let Some(before) = &progress.answers {
                self.tokens.add(&before.usage, &answers.usage);
                self.tokens.add_errors(&before.errors, &answers.errors);
            }
            progress.answers = Some(answers.into());
        });
        if has_spent {
            self.spent.write(user_id);
        }
        run.answered.notify_one();
        if let Some(ApiError {
            provider, status, ..
        }) = refused.filter(|_| !run.claimed.keeps_on)
        {
            let words = format!("the API of {provider} answered with status {status}");
            self.cancel(run, Cause::CredentialRefused(words));
        }
        if !over_budget.is_empty() {
            self.cancel(run, Cause::BudgetExhausted(over_budget));
        }
    }
}
