//! How long to wait before another try.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(500);
const MOST: Duration = Duration::from_secs(15);

/// Doubles with each failure, and spreads those that failed together.
#[must_use]
pub(crate) fn backoff(failures: u32) -> Duration {
    let full = FIRST.saturating_mul(1 << failures.min(10)).min(MOST);
    full.mul_f64(rand::random_range(0.5..1.0))
}
