//! The limits of a run: `run_class`, and `python_class` for scripts.

use serde::Deserialize;

use super::{
    Error,
    boost::{Boost, RawBoost},
    value::{Number, ranged},
};
use crate::limits::Limits;

/// The block of a class. All of it is optional.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawClass {
    cpu: Option<Number>,
    memory: Option<Number>,
    mbits: Option<Number>,
    pids: Option<Number>,
    /// Only in `run_class`: an interpreter that waits has started.
    start_boost: Option<RawBoost>,
}

impl RawClass {
    /// `has_headroom` is whether the node has a figure that bounds a boost.
    pub(super) fn run(mut self, has_headroom: bool) -> Result<(Limits, Option<Boost>), Error> {
        let boost = self.start_boost.take();
        let run = self.check("run_class", Limits::RUN)?;
        let boost = boost.map(|boost| boost.check(&run, has_headroom));
        Ok((run, boost.transpose()?))
    }

    /// Checks the limits of the block of this name.
    pub(super) fn check(self, block: &str, default: Limits) -> Result<Limits, Error> {
        let within = |name, given, default, [least, most]: [u32; 2]| {
            ranged(&format!("{block}.{name}"), given, default, least, most)
        };
        Ok(Limits {
            cpu_mhz: within("cpu", self.cpu, default.cpu_mhz, [10, 1_000_000])?,
            memory_mb: within("memory", self.memory, default.memory_mb, [16, 4_194_304])?,
            mbits: within("mbits", self.mbits, default.mbits, [1, 30_000])?,
            pids: within("pids", self.pids, default.pids, [8, 4_194_304])?,
        })
    }
}
