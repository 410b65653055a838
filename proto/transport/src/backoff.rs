//! The waits between tries of an operation that failed.

use std::time::Duration;

/// Gives the waits between tries: each is twice as long as the previous one, up to a maximum.
/// A wait is shortened at random, so that callers that failed together do not all try again
/// together.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    /// The next wait, before it is shortened.
    wait: Duration,
}

impl Backoff {
    #[must_use]
    pub const fn new(first: Duration, max: Duration) -> Self {
        Self {
            first,
            max,
            wait: first,
        }
    }

    /// Waits that do not grow.
    #[must_use]
    pub const fn steady(wait: Duration) -> Self {
        Self::new(wait, wait)
    }

    /// How long to wait before the next try: from half of the wait to all of it.
    #[must_use]
    pub fn next_wait(&mut self) -> Duration {
        let wait = self.wait.mul_f64(rand::random_range(0.5..1.0));
        self.wait = self.max.min(self.wait.saturating_mul(2));
        wait
    }

    /// Starts again with the first wait: a try has succeeded.
    pub fn reset(&mut self) {
        self.wait = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn waits_double_up_to_the_most_and_are_shortened_by_half_at_most(
            first in 1u64..1_000,
            further in 0u64..100_000,
            tries in 1usize..20,
        ) {
            let first = Duration::from_millis(first);
            let max = first + Duration::from_millis(further);
            let mut backoff = Backoff::new(first, max);
            let mut whole = first;
            for _ in 0..tries {
                let wait = backoff.next_wait();
                prop_assert!(wait >= whole / 2 && wait <= whole, "{wait:?} of {whole:?}");
                whole = max.min(whole * 2);
            }
            backoff.reset();
            prop_assert!(backoff.next_wait() <= first);
        }
    }

    #[test]
    fn steady_waits_do_not_grow() {
        let most = Duration::from_millis(500);
        let mut backoff = Backoff::steady(most);
        for _ in 0..10 {
            let wait = backoff.next_wait();
            assert!(wait >= most / 2 && wait <= most, "{wait:?}");
        }
    }
}
