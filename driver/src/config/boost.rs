//! More CPU for the start of a run.

use std::time::Duration;

use serde::Deserialize;

use super::{
    Error,
    value::{Number, duration_within, ranged, refused, text},
};
use crate::limits::Limits;

/// How much CPU a run may use at first, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boost {
    pub cpu_mhz: u32,
    pub time: Duration,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawBoost {
    cpu: Option<Number>,
    time: Option<String>,
}

impl RawBoost {
    /// `has_headroom` is whether the node has a figure that bounds it.
    pub(super) fn check(self, run: &Limits, has_headroom: bool) -> Result<Boost, Error> {
        const FIELD: &str = "run_class.start_boost";
        if !has_headroom {
            return Err(refused(
                FIELD,
                "set",
                "needs `run_headroom`, which bounds it",
            ));
        }
        let least = run.cpu_mhz + 1;
        if self.cpu.is_none() {
            let allowed = "must be a number above `run_class.cpu`";
            return Err(refused("run_class.start_boost.cpu", "missing", allowed));
        }
        Ok(Boost {
            cpu_mhz: ranged(
                "run_class.start_boost.cpu",
                self.cpu,
                least,
                least,
                1_000_000,
            )?,
            time: duration_within(
                "run_class.start_boost.time",
                text(self.time),
                Duration::from_secs(2),
                [Duration::from_millis(100), Duration::from_secs(60)],
            )?,
        })
    }
}
