//! When a CLI that is ready has nothing more to do.

use std::time::{Duration, Instant};

use crate::process::Process;

/// A CLI that is ready has something to do for some time yet. Done after the claim, it would
/// delay the prompt: Claude Code 2.1.332 sent its first request after 170 to 200 ms of half a core
/// if it was stopped a second later, and after 350 to 400 ms if it was stopped at once.
pub(crate) struct Quiet {
    cpu_time: Duration,
    pub(crate) next_look: Instant,
    give_up: Instant,
}

/// How long a CLI must do almost nothing.
const QUIET_TIME: Duration = Duration::from_secs(1);
/// Almost nothing: in 45 s, an idle Claude Code uses 340 ms.
const QUIET_CPU: Duration = Duration::from_millis(20);
/// A CLI that never rests is stopped all the same.
const QUIET_TIMEOUT: Duration = Duration::from_secs(20);

impl Quiet {
    pub(crate) fn new(process: &Process) -> Self {
        let now = Instant::now();
        Self {
            cpu_time: process.cpu_time(),
            next_look: now + QUIET_TIME,
            give_up: now + QUIET_TIMEOUT,
        }
    }

    /// Whether it has done almost nothing since the last look, or never will.
    pub(crate) fn is_reached(&mut self, process: &Process) -> bool {
        let now = Instant::now();
        if now < self.next_look {
            return false;
        }
        let cpu_time = process.cpu_time();
        let used = cpu_time.saturating_sub(self.cpu_time);
        self.cpu_time = cpu_time;
        self.next_look = now + QUIET_TIME;
        used <= QUIET_CPU || now >= self.give_up
    }
}
