//! How scripts have ended on this node, for who is paged: events on a target of their own, and
//! figures for metrics. The streak of failures outlives the driver.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::state::files;

/// From so many failures in a row on, each further one is an error.
const ALERT_STREAK: u64 = 3;

/// The scripts of a node.
#[derive(Debug)]
pub(crate) struct Scripts {
    file: PathBuf,
    figures: Mutex<Figures>,
}

/// What is counted. Everything but the streak is of this life of the driver.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Figures {
    /// Failures and timeouts since the last success.
    pub(crate) failure_streak: u64,
    /// By status.
    pub(crate) runs: BTreeMap<&'static str, u64>,
    /// Scripts that could not be run, or whose end is not known, by reason.
    pub(crate) errors: BTreeMap<&'static str, u64>,
    /// From the scripts' starts to their ends, all together.
    pub(crate) time: Duration,
}

/// The file.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    failure_streak: u64,
}

/// The end of one script.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Execution {
    pub(crate) status: Status,
    /// The script's own; `None` if it did not end by itself.
    pub(crate) exit_code: Option<i32>,
    pub(crate) duration: Duration,
    /// How many files were fetched.
    pub(crate) outputs: usize,
}

/// What became of a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Success,
    Failure,
    Timeout,
    /// It is not the script that failed, for this reason.
    Error(&'static str),
}

impl Status {
    /// Those of a script that ran, as events and metrics name them.
    pub(crate) const NAMES: [&'static str; 3] = ["success", "failure", "timeout"];
    /// Those of an error: its program, folder or files could not be used; its end is not known.
    pub(crate) const REASONS: [&'static str; 2] = ["not_started", "lost"];
}

impl Scripts {
    /// Reads the streak that an earlier life of the driver has left.
    pub(crate) fn open(state_dir: &Path) -> Self {
        let file = state_dir.join("scripts.json");
        let kept = match fs::read(&file) {
            Ok(text) => serde_json::from_slice::<Kept>(&text).map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Kept::default()),
            Err(error) => Err(error),
        };
        let Kept { failure_streak } = kept.unwrap_or_else(|error| {
            let error = crate::chain(&error);
            tracing::warn!(
                error,
                "cannot read how scripts ended; their streak begins at 0"
            );
            Kept::default()
        });
        Self {
            file,
            figures: Mutex::new(Figures {
                failure_streak,
                ..Figures::default()
            }),
        }
    }

    pub(crate) fn figures(&self) -> Figures {
        self.figures.lock().clone()
    }

    /// Counts the end of a script, and reports it.
    pub(crate) fn ended(&self, execution: &Execution) {
        let mut figures = self.figures.lock();
        let Execution { status, .. } = *execution;
        let before = figures.failure_streak;
        let name = match status {
            Status::Error(reason) => {
                *figures.errors.entry(reason).or_default() += 1;
                drop(figures);
                tracing::warn!(target: "telemetry.sandbox", reason, "sandbox could not run a script");
                return;
            }
            Status::Success => {
                figures.failure_streak = 0;
                "success"
            }
            Status::Failure | Status::Timeout => {
                figures.failure_streak += 1;
                if status == Status::Failure {
                    "failure"
                } else {
                    "timeout"
                }
            }
        };
        *figures.runs.entry(name).or_default() += 1;
        figures.time += execution.duration;
        let streak = figures.failure_streak;
        if streak != before {
            // It stays locked, so that the last streak wins.
            self.write(streak);
        }
        drop(figures);
        report(execution, name, streak);
    }

    fn write(&self, failure_streak: u64) {
        let text = serde_json::to_vec(&Kept { failure_streak });
        let text = text.expect("a number can be written as JSON");
        if let Err(error) = files::write(&self.file, &text, 0o600) {
            let error = crate::chain(&error);
            tracing::error!(
                error,
                "a restarted driver will not know the streak of failures"
            );
        }
    }
}

/// The events of the systems before this one, with their fields; all on one target.
fn report(execution: &Execution, status: &str, failure_streak: u64) {
    let duration_ms = u64::try_from(execution.duration.as_millis()).unwrap_or(u64::MAX);
    if failure_streak >= ALERT_STREAK {
        tracing::error!(
            target: "telemetry.sandbox",
            streak = failure_streak,
            "sandbox consecutive failure streak exceeded threshold"
        );
    }
    tracing::info!(
        target: "telemetry.sandbox",
        status,
        exit_code = execution.exit_code,
        timed_out = execution.status == Status::Timeout,
        duration_ms,
        outputs = execution.outputs,
        failure_streak,
        "sandbox execution finished"
    );
    if failure_streak > 0 {
        tracing::warn!(
            target: "telemetry.sandbox",
            status,
            overdue_failures = failure_streak,
            duration_ms,
            "sandbox is degraded, consider a retry"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(scripts: &Scripts, status: Status) -> u64 {
        scripts.ended(&Execution {
            status,
            exit_code: None,
            duration: Duration::from_millis(20),
            outputs: 0,
        });
        scripts.figures().failure_streak
    }

    #[test]
    fn the_streak_counts_what_scripts_do_and_outlives_the_driver() {
        let folder = tempfile::tempdir().unwrap();
        let scripts = Scripts::open(folder.path());
        assert_eq!(end(&scripts, Status::Failure), 1);
        assert_eq!(end(&scripts, Status::Timeout), 2);
        assert_eq!(end(&scripts, Status::Error("lost")), 2);
        let scripts = Scripts::open(folder.path());
        assert_eq!(end(&scripts, Status::Failure), 3);
        assert_eq!(end(&scripts, Status::Success), 0);
        assert_eq!(end(&scripts, Status::Failure), 1);
        let Figures {
            runs, errors, time, ..
        } = scripts.figures();
        assert_eq!(runs, BTreeMap::from([("failure", 2), ("success", 1)]));
        assert_eq!((errors.len(), time), (0, Duration::from_millis(60)));
        fs::write(folder.path().join("scripts.json"), "{").unwrap();
        assert_eq!(Scripts::open(folder.path()).figures(), Figures::default());
    }
}
