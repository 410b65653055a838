//! Run ids: UUIDs of version 7, so that each says when it was made.

use std::time::{Duration, SystemTime};

use uuid::Uuid;

/// When a run id was made, by the clock of who made it; `None` if it is not a UUIDv7.
#[must_use]
pub fn made_at(run_id: &str) -> Option<SystemTime> {
    let id = Uuid::parse_str(run_id).ok()?;
    let made = id.get_timestamp().filter(|_| id.get_version_num() == 7)?;
    let (seconds, nanos) = made.to_unix();
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}
