//! When the command must end: SIGTERM at its deadline, SIGKILL after the kill timeout.
//! Pure: callers pass the time.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

/// The next signal to send to the command, and when.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    at: Instant,
    step: Step,
    kill_timeout: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Step {
    Terminate,
    Kill,
}

impl Deadline {
    pub(crate) fn new(now: Instant, timeout: Duration, kill_timeout: Duration) -> Self {
        Self {
            at: now + timeout,
            step: Step::Terminate,
            kill_timeout,
        }
    }

    /// Whether the deadline has passed and the command has received SIGTERM.
    pub(crate) fn has_passed(&self) -> bool {
        self.step == Step::Kill
    }

    pub(crate) fn remaining(&self, now: Instant) -> Duration {
        self.at.saturating_duration_since(now)
    }

    /// The signal that is due now. SIGKILL is repeated every second, for processes that
    /// were forked while the previous one was sent.
    pub(crate) fn due(&mut self, now: Instant) -> Option<Signal> {
        if now < self.at {
            return None;
        }
        match self.step {
            Step::Terminate => {
                self.step = Step::Kill;
                self.at = now + self.kill_timeout;
                Some(Signal::SIGTERM)
            }
            Step::Kill => {
                self.at = now + Duration::from_secs(1);
                Some(Signal::SIGKILL)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_asked_first_and_killed_after_the_kill_timeout() {
        let start = Instant::now();
        let second = |n| start + Duration::from_secs(n);
        let mut deadline = Deadline::new(start, Duration::from_secs(60), Duration::from_secs(30));

        assert_eq!(deadline.remaining(second(50)), Duration::from_secs(10));
        assert_eq!(deadline.due(second(59)), None);
        assert!(!deadline.has_passed());
        assert_eq!(deadline.due(second(60)), Some(Signal::SIGTERM));
        assert!(deadline.has_passed());
        assert_eq!(deadline.due(second(89)), None);
        assert_eq!(deadline.due(second(90)), Some(Signal::SIGKILL));
        assert_eq!(deadline.due(second(90)), None);
        assert_eq!(deadline.due(second(91)), Some(Signal::SIGKILL));
    }
}
