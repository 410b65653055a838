//! How often callers may call this shim, and how often runs of users may begin.

use std::{
    num::NonZeroU32,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    state::keyed::HashMapStateStore,
};

/// After so many checks, names without recent calls are forgotten.
const MAX_UNTIDIED: u32 = 1024;

/// What one caller and one user may do per second.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct Rates {
    /// Calls of one caller per second, with a burst of the same number; further calls are refused.
    /// [default: no limit]
    #[arg(long = "caller-rate", value_name = "CALLS")]
    pub caller: Option<NonZeroU32>,
    /// New runs and leases of one user per second, with a burst of the same number; further ones
    /// are refused. [default: no limit]
    #[arg(long = "user-rate", value_name = "RUNS")]
    pub user: Option<NonZeroU32>,
}

/// A rate is exceeded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{whose} `{name}` exceeds the {whose} rate of this shim, {per_second} per second")]
pub struct Exceeded {
    pub whose: &'static str,
    pub name: String,
    pub per_second: u32,
    /// How long to wait before the next try can succeed.
    pub wait: Duration,
}

/// A limit for each of many names.
#[derive(Debug)]
pub struct Rate {
    whose: &'static str,
    /// `None` means no limit.
    limit: Option<(NonZeroU32, Limiter)>,
    asked: AtomicU32,
}

type Limiter = RateLimiter<String, HashMapStateStore<String>, DefaultClock>;

impl Rate {
    /// A limit of `per_second` for each name. `whose` says what the names are.
    #[must_use]
    pub fn new(whose: &'static str, per_second: Option<NonZeroU32>) -> Self {
        let limit = per_second.map(|most| (most, RateLimiter::hashmap(Quota::per_second(most))));
        Self {
            whose,
            limit,
            asked: AtomicU32::new(0),
        }
    }

    /// Counts one more call of this name.
    ///
    /// # Errors
    /// [`Exceeded`]
    pub fn check(&self, name: &str) -> Result<(), Exceeded> {
        let Some((per_second, limiter)) = &self.limit else {
            return Ok(());
        };
        if self.asked.fetch_add(1, Ordering::Relaxed) % MAX_UNTIDIED == MAX_UNTIDIED - 1 {
            limiter.retain_recent();
            limiter.shrink_to_fit();
        }
        limiter
            .check_key(&name.to_owned())
            .map_err(|until| Exceeded {
                whose: self.whose,
                name: name.to_owned(),
                per_second: per_second.get(),
                wait: until.wait_time_from(DefaultClock::default().now()),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_has_a_rate_of_its_own() {
        let rate = Rate::new("user", NonZeroU32::new(3));
        for _ in 0..3 {
            rate.check("alice").unwrap();
        }
        let exceeded = rate.check("alice").unwrap_err();
        assert!(exceeded.wait > Duration::ZERO && exceeded.wait <= Duration::from_secs(1));
        assert!(
            exceeded
                .to_string()
                .starts_with("user `alice` exceeds the user rate of this shim, 3 per second")
        );
        rate.check("bob").unwrap();
        let any = Rate::new("user", None);
        assert!((0..1000).all(|_| any.check("alice").is_ok()));
    }

    #[test]
    fn names_that_do_not_come_again_are_forgotten() {
        let rate = Rate::new("user", NonZeroU32::new(1_000_000));
        for name in 0..2 * MAX_UNTIDIED {
            rate.check(&name.to_string()).unwrap();
        }
        let (_, limiter) = rate.limit.as_ref().unwrap();
        assert!(limiter.len() <= MAX_UNTIDIED as usize, "{}", limiter.len());
    }
}
