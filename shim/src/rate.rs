//! How often callers may call, and runs of users may begin, at this shim.

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

/// After so many questions, names that have not come for a while are forgotten.
const TIDY: u32 = 1024;

/// What one caller and one user may do in a second.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct Rates {
    /// Calls of one caller a second, and as many at once; more are refused. [default: any]
    #[arg(long = "caller-rate", value_name = "CALLS")]
    pub caller: Option<NonZeroU32>,
    /// Runs and leases of one user that begin in a second, and as many at once; more are
    /// refused. [default: any]
    #[arg(long = "user-rate", value_name = "RUNS")]
    pub user: Option<NonZeroU32>,
}

/// It is too much.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{whose} `{name}` has come more than {per_second} times a second, this shim lets no more")]
pub struct Exceeded {
    pub whose: &'static str,
    pub name: String,
    pub per_second: u32,
    /// Then it is let again.
    pub wait: Duration,
}

/// A limit for each of many names.
#[derive(Debug)]
pub struct Rate {
    whose: &'static str,
    /// `None` lets everybody.
    limit: Option<(NonZeroU32, Limiter)>,
    asked: AtomicU32,
}

type Limiter = RateLimiter<String, HashMapStateStore<String>, DefaultClock>;

impl Rate {
    /// For a second; `whose` is what the names are.
    #[must_use]
    pub fn new(whose: &'static str, per_second: Option<NonZeroU32>) -> Self {
        let limit = per_second.map(|most| (most, RateLimiter::hashmap(Quota::per_second(most))));
        Self {
            whose,
            limit,
            asked: AtomicU32::new(0),
        }
    }

    /// Once more for that name.
    ///
    /// # Errors
    /// [`Exceeded`]
    pub fn check(&self, name: &str) -> Result<(), Exceeded> {
        let Some((per_second, limiter)) = &self.limit else {
            return Ok(());
        };
        if self.asked.fetch_add(1, Ordering::Relaxed) % TIDY == TIDY - 1 {
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
                .starts_with("user `alice` has come more than 3 times")
        );
        rate.check("bob").unwrap();
        let any = Rate::new("user", None);
        assert!((0..1000).all(|_| any.check("alice").is_ok()));
    }

    #[test]
    fn names_that_do_not_come_again_are_forgotten() {
        let rate = Rate::new("user", NonZeroU32::new(1_000_000));
        for name in 0..2 * TIDY {
            rate.check(&name.to_string()).unwrap();
        }
        let (_, limiter) = rate.limit.as_ref().unwrap();
        assert!(limiter.len() <= TIDY as usize, "{}", limiter.len());
    }
}
