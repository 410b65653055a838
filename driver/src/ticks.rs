//! Periodic work of many tasks, at the same moments.

use std::{sync::OnceLock, time::Duration};

use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

/// Ticks every `every`, together with all other tickers of that period in this process: a
/// hundred tasks wake the process once instead of a hundred times. The first tick comes
/// after 0.5 to 1.5 periods; a period over a day counts as a day.
pub(crate) fn ticks(every: Duration) -> Interval {
    static BEGIN: OnceLock<Instant> = OnceLock::new();
    let (now, every) = (Instant::now(), every.min(DAY));
    let next = now + until_next(now - *BEGIN.get_or_init(|| now), every);
    let mut ticks = interval_at(next, every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks
}

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Time from `since`, counted from the first moment, to a multiple of the period.
fn until_next(since: Duration, every: Duration) -> Duration {
    let over = since.as_nanos() % every.as_nanos().max(1);
    let left = every - Duration::from_nanos(u64::try_from(over).unwrap_or(0)).min(every);
    // A measurement over a very short time would be noise.
    if left < every / 2 { left + every } else { left }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn whenever_they_begin_they_tick_together(first in 0_u64..10_000, later in 0_u64..10_000, every in 1_u64..3_000) {
            let every = Duration::from_millis(every);
            let next = |since: u64| {
                let since = Duration::from_millis(since);
                let wait = until_next(since, every);
                assert!(wait >= every / 2 && wait <= every * 3 / 2);
                (since + wait).as_nanos() % every.as_nanos()
            };
            proptest::prop_assert_eq!(next(first), 0);
            proptest::prop_assert_eq!(next(first + later), 0);
        }
    }
}
