//! What the driver removes by itself.

use std::time::Duration;

use serde::Deserialize;

use super::{
    Error,
    value::{duration, text},
};

const MINUTE: Duration = Duration::from_secs(60);

/// What the driver removes, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gc {
    pub image: bool,
    /// Counted from the end of the last task that used the image.
    pub image_delay: Duration,
    /// Whether containers of ended tasks are removed.
    pub container: bool,
    pub dangling: Dangling,
}

/// How the driver finds containers that belong to no task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dangling {
    pub enabled: bool,
    /// Only log what would be removed.
    pub dry_run: bool,
    pub period: Duration,
    /// Minimum time since a container was first seen, before it may be removed.
    pub creation_grace: Duration,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawGc {
    image: Option<bool>,
    image_delay: Option<String>,
    container: Option<bool>,
    dangling_containers: Option<RawDangling>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawDangling {
    enabled: Option<bool>,
    dry_run: Option<bool>,
    period: Option<String>,
    creation_grace: Option<String>,
}

impl RawGc {
    pub(super) fn check(self) -> Result<Gc, Error> {
        let dangling = self.dangling_containers.unwrap_or_default();
        let minutes = |field: &str, given, default: u32| {
            duration(
                &format!("gc.{field}"),
                text(given),
                default * MINUTE,
                MINUTE,
            )
        };
        Ok(Gc {
            image: self.image.unwrap_or(true),
            image_delay: duration(
                "gc.image_delay",
                text(self.image_delay),
                3 * MINUTE,
                Duration::ZERO,
            )?,
            container: self.container.unwrap_or(true),
            dangling: Dangling {
                enabled: dangling.enabled.unwrap_or(true),
                dry_run: dangling.dry_run.unwrap_or_default(),
                period: minutes("dangling_containers.period", dangling.period, 5)?,
                creation_grace: minutes(
                    "dangling_containers.creation_grace",
                    dangling.creation_grace,
                    5,
                )?,
            },
        })
    }
}
