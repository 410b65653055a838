//! Run ids: UUIDs of version 7, which contain the time when they were made.

use std::time::{Duration, SystemTime};

use uuid::Uuid;

/// When a run id was made, by its maker's clock; `None` if it is not a UUIDv7.
#[must_use]
pub fn made_at(run_id: &str) -> Option<SystemTime> {
    let id = Uuid::parse_str(run_id).ok()?;
    let made = id.get_timestamp().filter(|_| id.get_version_num() == 7)?;
    let (seconds, nanos) = made.to_unix();
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}
