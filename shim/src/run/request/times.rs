//! The times that a caller may give, their bounds and defaults.

use std::{ops::RangeInclusive, time::Duration};

use polydev_proto::provider::Provider;

use super::Invalid;
use crate::access::default_timeout;

/// The shortest time of any kind, but for a wait.
pub(in crate::run) const MIN_TIME: Duration = Duration::from_millis(1);
const DEFAULT_QUEUE_TIMEOUT: Duration = Duration::from_secs(10);
/// Well below the largest age of a run id that drivers accept.
const MAX_QUEUE_TIMEOUT: Duration = Duration::from_secs(30 * 60);
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// The default kill timeout, and the largest.
const MAX_KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// Every run has ended after this time from its claim.
pub const MAX_RUN_TIME: Duration = MAX_TIMEOUT
    .saturating_add(MAX_KILL_TIMEOUT)
    .saturating_add(TELL_TIMEOUT);
/// How long files may take to arrive, artifacts to be fetched, and a driver to come back and
/// report the end.
pub(super) const TELL_TIMEOUT: Duration = Duration::from_secs(8 * 60);

pub(super) fn timeout(
    given: Option<prost_types::Duration>,
    provider: Provider,
) -> Result<Duration, Invalid> {
    let allowed = MIN_TIME..=MAX_TIMEOUT;
    let default = default_timeout(provider);
    bounded("timeout", given, default, allowed, "1 ms to 24 h")
}

pub(super) fn kill_timeout(given: Option<prost_types::Duration>) -> Result<Duration, Invalid> {
    let allowed = MIN_TIME..=MAX_KILL_TIMEOUT;
    bounded(
        "kill_timeout",
        given,
        MAX_KILL_TIMEOUT,
        allowed,
        "1 ms to 30 s",
    )
}

/// `None` for no limit.
pub(super) fn max_api_wait(
    given: Option<prost_types::Duration>,
) -> Result<Option<prost_types::Duration>, Invalid> {
    let allowed = MIN_TIME..=MAX_TIMEOUT;
    let wait = |given| {
        bounded(
            "max_api_wait",
            Some(given),
            MAX_TIMEOUT,
            allowed,
            "1 ms to 24 h",
        )
    };
    let wait = given.map(wait).transpose()?;
    Ok(wait.and_then(|wait| wait.try_into().ok()))
}

/// How long a run or a lease may wait for a slot.
///
/// # Errors
/// [`Invalid::Value`]
pub(in crate::run) fn queue_timeout(
    given: Option<prost_types::Duration>,
) -> Result<Duration, Invalid> {
    bounded(
        "queue_timeout",
        given,
        DEFAULT_QUEUE_TIMEOUT,
        Duration::ZERO..=MAX_QUEUE_TIMEOUT,
        "0 s to 30 min",
    )
}

/// A time that a caller has given, or the default.
///
/// # Errors
/// [`Invalid::Value`]
pub(in crate::run) fn bounded(
    field: &'static str,
    given: Option<prost_types::Duration>,
    default: Duration,
    range: RangeInclusive<Duration>,
    allowed: &'static str,
) -> Result<Duration, Invalid> {
    let Some(given) = given else {
        return Ok(default);
    };
    let value = Duration::try_from(given).ok();
    value
        .filter(|value| range.contains(value))
        .ok_or_else(|| Invalid::Value {
            field,
            given: given.to_string(),
            allowed,
        })
}
