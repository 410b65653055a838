//! Pauses an image whose containers fail again and again; otherwise all slots of the node
//! would make containers of it without end.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};

/// Consecutive failures, of all slots together, after which an image is paused.
const MAX_FAILURES: u32 = 5;
/// Time until one slot may try the image again; doubles with each further failure.
const FIRST_INTERVAL: Duration = Duration::from_secs(15);
const MAX_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// An image is paused.
#[derive(Debug, thiserror::Error)]
#[error("`{image}` failed {failures} times in a row, the last time because {reason}")]
pub struct Open {
    pub image: String,
    pub failures: u32,
    pub reason: String,
    /// Time until the image may be tried again.
    pub retry_in: Duration,
}

/// The failed images of a node, by reference. Callers pass the time, for tests.
#[derive(Debug, Default)]
pub struct Breakers {
    images: Mutex<HashMap<String, Breaker>>,
}

#[derive(Debug)]
struct Breaker {
    /// Digest of the failed content.
    id: String,
    failures: u32,
    reason: String,
    retry_at: Instant,
}

impl Breakers {
    /// Whether a container may be made from this content of an image. For a paused image,
    /// one caller at a time may try, at increasing intervals.
    ///
    /// # Errors
    /// [`Open`]
    pub fn check(&self, image: &str, id: &str, now: Instant) -> Result<(), Open> {
        let mut images = self.lock();
        let Some(breaker) = images.get_mut(image) else {
            return Ok(());
        };
        if breaker.id != id {
            tracing::info!(image, "the image has changed, trying it again");
            images.remove(image);
            return Ok(());
        }
        if breaker.failures < MAX_FAILURES {
            return Ok(());
        }
        if breaker.retry_at <= now {
            breaker.retry_at = now + wait(breaker.failures);
            return Ok(());
        }
        Err(Open {
            image: image.to_owned(),
            failures: breaker.failures,
            reason: breaker.reason.clone(),
            retry_in: breaker.retry_at - now,
        })
    }

    /// How many images are paused, also those of which one container is being tried.
    pub fn paused(&self) -> u64 {
        let images = self.lock();
        let paused = images
            .values()
            .filter(|breaker| breaker.failures >= MAX_FAILURES);
        paused.count() as u64
    }

    /// Records that a container of the image failed.
    pub fn failed(&self, image: &str, id: &str, reason: &str, now: Instant) {
        let mut images = self.lock();
        let failures = match images.get(image) {
            Some(breaker) if breaker.id == id => breaker.failures + 1,
            _ => 1,
        };
        let breaker = Breaker {
            id: id.to_owned(),
            failures,
            reason: reason.to_owned(),
            retry_at: now + wait(failures),
        };
        images.insert(image.to_owned(), breaker);
        if failures == MAX_FAILURES {
            tracing::warn!(
                image,
                reason,
                "the image failed {failures} times in a row and is paused"
            );
        }
    }

    /// Records that a container of the image worked.
    pub fn worked(&self, image: &str) {
        self.lock().remove(image);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Breaker>> {
        self.images.lock()
    }
}

fn wait(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(MAX_FAILURES).min(10);
    FIRST_INTERVAL
        .saturating_mul(1 << doublings)
        .min(MAX_INTERVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_fails_is_left_alone_and_tried_by_one_at_a_time() {
        let (breakers, start) = (Breakers::default(), Instant::now());
        for _ in 0..MAX_FAILURES {
            breakers.check("image", "one", start).unwrap();
            breakers.failed("image", "one", "it is broken", start);
        }
        let open = breakers.check("image", "one", start).unwrap_err();
        assert_eq!(
            open.to_string(),
            "`image` failed 5 times in a row, the last time because it is broken"
        );
        assert_eq!(open.retry_in, FIRST_INTERVAL);
        breakers.check("other", "one", start).unwrap();

        let later = start + FIRST_INTERVAL;
        breakers.check("image", "one", later).unwrap();
        breakers.check("image", "one", later).unwrap_err();
        breakers.failed("image", "one", "again", later);
        let open = breakers.check("image", "one", later).unwrap_err();
        assert_eq!(open.retry_in, 2 * FIRST_INTERVAL);
        breakers.worked("image");
        breakers.check("image", "one", later).unwrap();
    }

    #[test]
    fn another_image_of_the_same_name_is_tried_at_once() {
        let (breakers, now) = (Breakers::default(), Instant::now());
        for _ in 0..MAX_FAILURES {
            breakers.failed("image", "one", "it is broken", now);
        }
        breakers.check("image", "one", now).unwrap_err();
        breakers.check("image", "two", now).unwrap();
        breakers.check("image", "two", now).unwrap();
    }

    #[test]
    fn the_wait_has_an_end() {
        assert_eq!(wait(u32::MAX), MAX_INTERVAL);
    }
}
