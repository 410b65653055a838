//! Tokens that all runs of this life of the driver have used, and errors that they got from APIs,
//! for metrics.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use polydev_proto::broker::{ApiError, ModelUsage};

/// Most models with figures of their own: each is a time series.
const MAX_MODELS: usize = 200;
const OTHER: &str = "other";

/// Tokens by provider and model, and errors by provider and status.
#[derive(Debug, Default)]
pub(crate) struct Tokens(Mutex<BTreeMap<(String, String), Used>>, Mutex<ApiErrors>);

/// Answers with an error, by provider and HTTP status: 0 for an API that could not be reached.
pub(crate) type ApiErrors = BTreeMap<(String, u32), u64>;

/// Tokens of one model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Used {
    /// Those that no cache had.
    pub(crate) input: u64,
    /// Those that a cache had.
    pub(crate) cached_input: u64,
    pub(crate) output: u64,
}

impl Tokens {
    /// Counts what a run has used since `before`.
    pub(crate) fn add(&self, before: &[ModelUsage], now: &[ModelUsage]) {
        let mut all = self.0.lock();
        for used in now {
            let is_it = |known: &&ModelUsage| {
                (&known.provider, &known.model) == (&used.provider, &used.model)
            };
            let before = before.iter().find(is_it).map(Used::from);
            let (before, now) = (before.unwrap_or_default(), Used::from(used));
            let name = (used.provider.clone(), used.model.clone());
            let name = match all.len() < MAX_MODELS || all.contains_key(&name) {
                true => name,
                false => (name.0, OTHER.to_owned()),
            };
            let sum = all.entry(name).or_default();
            sum.input += now.input.saturating_sub(before.input);
            sum.cached_input += now.cached_input.saturating_sub(before.cached_input);
            sum.output += now.output.saturating_sub(before.output);
        }
    }

    /// Counts the errors that a run has got since `before`.
    pub(crate) fn add_errors(&self, before: &[ApiError], now: &[ApiError]) {
        let mut all = self.1.lock();
        for error in now {
            let is_it = |known: &&ApiError| {
                (&known.provider, known.status) == (&error.provider, error.status)
            };
            let before = before.iter().find(is_it).map_or(0, |known| known.count);
            let name = (error.provider.clone(), error.status);
            *all.entry(name).or_default() += error.count.saturating_sub(before);
        }
    }

    pub(crate) fn errors(&self) -> ApiErrors {
        self.1.lock().clone()
    }

    pub(crate) fn all(&self) -> BTreeMap<(String, String), Used> {
        self.0.lock().clone()
    }
}

impl From<&ModelUsage> for Used {
    fn from(usage: &ModelUsage) -> Self {
        Self {
            input: usage.input_tokens.saturating_sub(usage.cached_input_tokens),
            cached_input: usage.cached_input_tokens,
            output: usage.output_tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_is_told_of_twice_counts_once() {
        let tokens = Tokens::default();
        let used = |input_tokens, output_tokens| ModelUsage {
            provider: "openai".into(),
            model: "m".into(),
            input_tokens,
            cached_input_tokens: 1,
            output_tokens,
            ..ModelUsage::default()
        };
        tokens.add(&[], &[used(10, 2)]);
        tokens.add(&[used(10, 2)], &[used(10, 2)]);
        tokens.add(&[used(10, 2)], &[used(30, 5)]);
        tokens.add(&[], &[used(4, 4)]);
        let all = tokens.all();
        let expected = Used {
            input: 29 + 3,
            cached_input: 2,
            output: 9,
        };
        assert_eq!(all.into_values().collect::<Vec<_>>(), [expected]);
    }

    #[test]
    fn errors_are_counted_by_what_the_api_answered() {
        let tokens = Tokens::default();
        let error = |status, count| ApiError {
            provider: "openai".into(),
            status,
            count,
        };
        tokens.add_errors(&[], &[error(429, 2)]);
        tokens.add_errors(&[error(429, 2)], &[error(429, 3), error(0, 1)]);
        let errors = tokens.errors();
        assert_eq!(errors[&("openai".to_owned(), 429)], 3);
        assert_eq!(errors[&("openai".to_owned(), 0)], 1);
    }
}
