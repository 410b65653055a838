//! How long to wait before another try.

use std::time::Duration;

const FIRST_INTERVAL: Duration = Duration::from_millis(500);
const MAX_INTERVAL: Duration = Duration::from_secs(15);

/// Doubles with each failure, and spreads those that failed together.
#[must_use]
pub(crate) fn backoff(failures: u32) -> Duration {
    let full = FIRST_INTERVAL
        .saturating_mul(1 << failures.min(10))
        .min(MAX_INTERVAL);
    full.mul_f64(rand::random_range(0.5..1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_doubles_up_to_a_bound_and_is_spread(failures in any::<u32>()) {
            let full = match failures {
                0..5 => FIRST_INTERVAL * 2u32.pow(failures),
                _ => MAX_INTERVAL,
            };
            let waits: Vec<_> = (0..20).map(|_| backoff(failures)).collect();
            prop_assert!(waits.iter().all(|wait| (full / 2..=full).contains(wait)), "{waits:?}");
            prop_assert!(waits.iter().any(|wait| *wait != waits[0]), "all at once");
        }
    }
}
