//! What the user of a run may use in a day.

use polydev_proto::broker::Budget;

/// The user has used it up, with the figures.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the user's budget for today (UTC) is used up: {used} of {most} {unit}")]
pub struct OverBudget {
    used: u64,
    most: u64,
    unit: &'static str,
}

/// Checks whether a run that has used so much may use more.
///
/// # Errors
/// [`OverBudget`]
pub(crate) fn check(budget: &Budget, requests: u64, tokens: u64) -> Result<(), OverBudget> {
    for (most, others, own, unit) in [
        (budget.requests, budget.used_requests, requests, "requests"),
        (budget.tokens, budget.used_tokens, tokens, "tokens"),
    ] {
        let used = others.saturating_add(own);
        if most > 0 && used >= most {
            return Err(OverBudget { used, most, unit });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_other_runs_have_used_counts_too() {
        let budget = Budget {
            requests: 10,
            tokens: 1000,
            used_requests: 8,
            used_tokens: 900,
        };
        assert_eq!(check(&budget, 1, 99), Ok(()));
        let words = |requests, tokens| check(&budget, requests, tokens).unwrap_err().to_string();
        assert_eq!(
            words(2, 0),
            "the user's budget for today (UTC) is used up: 10 of 10 requests"
        );
        assert_eq!(
            words(0, 150),
            "the user's budget for today (UTC) is used up: 1050 of 1000 tokens"
        );
        assert_eq!(check(&Budget::default(), u64::MAX, u64::MAX), Ok(()));
    }
}
