//! What a user may use of models in a day, for shims, which know all nodes, and brokers, which
//! hold a run to it.

use std::time::SystemTime;

use crate::broker::{Budget, ModelUsage};

/// How much of models was used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "grpc", derive(serde::Serialize, serde::Deserialize))]
pub struct Used {
    /// Requests to models.
    pub requests: u64,
    /// Input and output.
    pub tokens: u64,
}

/// A budget is used up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the user's budget for today (UTC) is used up: {used} of {most} {unit}")]
pub struct Exhausted {
    pub used: u64,
    pub most: u64,
    pub unit: &'static str,
}

/// The days since 1970-01-01 (UTC). A budget is for one of them.
#[must_use]
pub fn today() -> u64 {
    const DAY: u64 = 24 * 60 * 60;
    let since = SystemTime::UNIX_EPOCH.elapsed();
    since.unwrap_or_default().as_secs() / DAY
}

impl Used {
    /// So many requests, and the tokens of these models.
    #[must_use]
    pub fn of(requests: u64, models: &[ModelUsage]) -> Self {
        let tokens = models.iter().fold(0, |sum: u64, model| {
            sum.saturating_add(model.input_tokens)
                .saturating_add(model.output_tokens)
        });
        Self { requests, tokens }
    }

    /// Adds what was used elsewhere.
    pub fn add(&mut self, other: Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.tokens = self.tokens.saturating_add(other.tokens);
    }
}

impl Budget {
    /// Checks whether a run that has used so much may use more.
    ///
    /// # Errors
    /// [`Exhausted`]
    pub fn check(&self, own: Used) -> Result<(), Exhausted> {
        let mut used = own;
        // What other runs had used counts for the day of the claim.
        if self.day == today() {
            used.add(Used {
                requests: self.used_requests,
                tokens: self.used_tokens,
            });
        }
        for (most, used, unit) in [
            (self.requests, used.requests, "requests"),
            (self.tokens, used.tokens, "tokens"),
        ] {
            if most > 0 && used >= most {
                return Err(Exhausted { used, most, unit });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_other_runs_have_used_counts_on_the_day_of_the_claim() {
        let mut budget = Budget {
            requests: 10,
            tokens: 1000,
            used_requests: 8,
            used_tokens: 900,
            day: today(),
        };
        let check = |budget: &Budget, requests, tokens| {
            let checked = budget.check(Used { requests, tokens });
            checked.map_err(|exhausted| exhausted.to_string())
        };
        assert_eq!(check(&budget, 1, 99), Ok(()));
        let words = |of: &str| {
            Err(format!(
                "the user's budget for today (UTC) is used up: {of}"
            ))
        };
        assert_eq!(check(&budget, 2, 0), words("10 of 10 requests"));
        assert_eq!(check(&budget, 0, 150), words("1050 of 1000 tokens"));
        budget.day -= 1;
        assert_eq!(check(&budget, 9, 999), Ok(()));
        assert_eq!(check(&budget, 10, 0), words("10 of 10 requests"));
        assert_eq!(check(&Budget::default(), u64::MAX, u64::MAX), Ok(()));
    }
}
