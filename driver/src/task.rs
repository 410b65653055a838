//! Plain tasks: ordinary jobs of an operator, without a shim.
//!
//! Read in the order of a task's life: [`plan`] works out its container from the job
//! ([`resources`], [`mounts`], [`nomads`], [`folders`], [`network`], [`neighbour`]), [`mod@start`] makes
//! it, with the sources of its mounts on the [`stage`], [`journal`] records it, [`outside`] is
//! what it has at the broker, [`keeper`] follows it to its end by what init says ([`listen`]),
//! [`output`] copies its output if init does not,
//! [`exec`] runs another command next to it. [`book`] holds the node's tasks for all
//! others.

pub mod book;
pub mod exec;
mod folders;
pub mod journal;
mod keeper;
mod listen;
mod mounts;
mod neighbour;
mod network;
mod nomads;
mod output;
mod outside;
pub mod plan;
mod resources;
pub mod stage;
mod start;

pub(crate) use keeper::{NEVER_STARTED, recover};
pub use start::{Error as StartError, start};

use std::{
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use nix::sys::signal::Signal;
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use crate::{
    docker::removal,
    images::Use,
    limits::{self, Usage},
    process::REAL_TIME,
    site::Site,
};
use book::Book;
use journal::{Entry, Journal};
use stage::Stage;

/// How long init may take to report the end of a plain task's command after SIGKILL, before
/// init itself is killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(3);

/// The plain tasks of a node, and what they share.
#[derive(Debug)]
pub struct Tasks {
    pub site: Arc<Site>,
    pub book: Book,
    journal: Journal,
    stage: Stage,
}

impl Tasks {
    #[must_use]
    pub fn new(site: Arc<Site>, journal: Journal, stage: Stage) -> Self {
        Self {
            site,
            book: Book::default(),
            journal,
            stage,
        }
    }

    /// No task starts any more.
    pub(crate) fn leave(&self) {
        self.stage.leave();
    }
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Exit {
    /// The command's exit status, or 128 plus the number of the signal that ended it.
    pub code: i32,
    pub signal: i32,
    pub oom_killed: bool,
    /// A failure other than the command's; empty if there was none.
    pub error: String,
    pub at: Option<SystemTime>,
}

/// One plain task, as seen by all but its keeper.
#[derive(Debug)]
pub struct Task {
    /// The journal's entry, except for the exit.
    pub entry: Entry,
    signals: mpsc::Sender<i32>,
    /// Cancelled to end the task at once.
    kill: tokio_util::sync::CancellationToken,
    end: watch::Sender<Option<Exit>>,
    /// `None` if the task ended before this life of the driver.
    limits: Option<Arc<limits::Handle>>,
    /// Its usage when its control group last existed.
    used: Mutex<Usage>,
    _image: Use,
}

/// A signal that Linux or this driver does not know.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown signal `{name}`; must be a name such as `SIGTERM` or `RTMIN+3`, or a number from 1 to 31 or 34 to 64"
)]
pub struct UnknownSignal {
    pub name: String,
}

impl Task {
    fn name(&self) -> &str {
        &self.entry.identity.task_name
    }

    /// Waits for the task's end. Cancel safe, for any number of waiters.
    pub async fn ended(&self) -> Exit {
        let mut end = self.end.subscribe();
        match end.wait_for(Option::is_some).await.map(|end| end.clone()) {
            Ok(Some(end)) => end,
            // `self` owns the sender, and `wait_for` waits for `Some`.
            Ok(None) | Err(_) => unreachable!("a task outlives those who wait for it"),
        }
    }

    /// How the task ended, if it has.
    #[must_use]
    pub fn end(&self) -> Option<Exit> {
        self.end.borrow().clone()
    }

    /// Sends a signal to the command; does nothing if the command has ended.
    ///
    /// # Errors
    /// [`UnknownSignal`]
    pub fn signal(&self, name: &str) -> Result<(), UnknownSignal> {
        self.send(signal_number(name)?);
        Ok(())
    }

    /// Asks the command to stop, and kills it after `limit`. Returns when the task has
    /// ended. An empty `signal` means the image's, and an unknown one means SIGTERM: the
    /// task must stop.
    pub async fn stop(&self, signal: &str, limit: Duration) {
        let signal = if signal.is_empty() {
            &self.entry.stop_signal
        } else {
            signal
        };
        let number = signal_number(signal).unwrap_or_else(|unknown| {
            tracing::warn!(task = self.entry.identity.task_id, %unknown, "sending SIGTERM");
            Signal::SIGTERM as i32
        });
        if !limit.is_zero() {
            self.send(number);
            if timeout(limit, self.ended()).await.is_ok() {
                return;
            }
        }
        self.send(Signal::SIGKILL as i32);
        if timeout(KILL_TIMEOUT, self.ended()).await.is_err() {
            self.kill.cancel();
            self.ended().await;
        }
    }

    /// Does nothing if the task has ended or if too many signals wait.
    fn send(&self, number: i32) {
        let _not_taken = self.signals.try_send(number);
    }

    /// Ends the task now, unless it has ended.
    pub async fn kill(&self) {
        self.kill.cancel();
        self.ended().await;
    }

    /// Ends the task and removes its container (unless `gc.container` is false), journal entry
    /// and folder, and its image if unused. What Docker cannot remove now is removed later.
    pub async fn destroy(&self, tasks: &Tasks) {
        self.kill().await;
        let Entry {
            container,
            identity,
            link,
            ..
        } = &self.entry;
        let site = &tasks.site;
        if site.config.gc.container {
            removal::remove(&site.docker, container).await;
        }
        if let Some(folder) = link {
            let _gone_already = std::fs::remove_dir_all(folder);
        }
        tasks.journal.remove(identity);
        tasks.book.remove(&identity.task_id);
    }

    /// What the task uses now, or used when it ended.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let mut used = self.used.lock();
        if let (Some(limits), true) = (&self.limits, self.end.borrow().is_none()) {
            *used = limits.usage();
        }
        *used
    }
}

/// The number of a signal, given by name (with or without `SIG`) or by number, as Docker takes
/// them.
fn signal_number(name: &str) -> Result<i32, UnknownSignal> {
    let unknown = || UnknownSignal {
        name: name.to_owned(),
    };
    let is_digits = name.bytes().all(|byte| byte.is_ascii_digit());
    if let Some(number) = name.parse::<i32>().ok().filter(|_| is_digits) {
        let is_known = Signal::try_from(number).is_ok() || REAL_TIME.contains(&number);
        return is_known.then_some(number).ok_or_else(unknown);
    }
    let upper = name.to_uppercase();
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    let named = Signal::from_str(&format!("SIG{short}")).map(|signal| signal as i32);
    named.ok().or_else(|| real_time(short)).ok_or_else(unknown)
}

/// `RTMIN`, `RTMIN+3`, `RTMAX-2`.
fn real_time(name: &str) -> Option<i32> {
    let offset = |text: &str, sign: char| match text {
        "" => Some(0),
        text => text.strip_prefix(sign)?.parse::<u8>().ok().map(i32::from),
    };
    let from_least = name
        .strip_prefix("RTMIN")
        .and_then(|rest| Some(REAL_TIME.start() + offset(rest, '+')?));
    let from_most = name
        .strip_prefix("RTMAX")
        .and_then(|rest| Some(REAL_TIME.end() - offset(rest, '-')?));
    from_least
        .or(from_most)
        .filter(|number| REAL_TIME.contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C022.
    #[test]
    fn signals_are_known_by_name_and_number() {
        for (name, number) in [
            ("SIGTERM", 15),
            ("sigint", 2),
            ("HUP", 1),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("rtmin", 34),
            ("RTMAX-14", 50),
            ("64", 64),
        ] {
            assert_eq!(signal_number(name), Ok(number), "{name}");
        }
        for name in [
            "", "SIGNOT", "0", "33", "65", "-1", "+9", "RTMIN+31", "RTMIN-1", "RTMAX-99",
        ] {
            let unknown = signal_number(name).unwrap_err();
            assert_eq!(unknown.name, name);
        }
    }
}
