//! Runs: one command each, from its claim until its results are no longer kept. A run
//! outlives its caller's connection, and this process.
//!
//! Read in the order of a run's life: [`claim`] is a shim's request, [`standing`] decides
//! about it, [`book`] knows every run of the node, [`journal`] keeps runs across restarts
//! of this process, [`carry`] starts the command and carries its streams, [`window`] holds
//! its output, [`beside`] holds what else is kept, [`refreshed`] is for the credential
//! store, [`tools`] are calls of tools that a shim decides about, [`api`] is what the APIs have answered, [`script`] is the end of a script, [`follow`] sends events to a caller, and
//! [`listing`] lists runs. `node/recover.rs` recovers runs after a restart.

pub(crate) mod api;
mod beside;
pub mod book;
pub(crate) mod cancel;
pub(crate) mod carry;
pub mod claim;
pub mod follow;
pub mod journal;
pub mod listing;
pub mod refreshed;
mod script;
pub mod standing;
pub mod tools;
mod window;

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use polydev_proto::{
    broker::{ApiError, Destination, ModelUsage},
    init::{Artifacts, Form, Refreshed, TerminalSize},
    node::{self, ended::Reason},
    stream::PerStream,
};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use api::Answers;
use beside::Beside;
use cancel::Cancel;
use claim::Refusal;
use journal::Claimed;
use window::Window;

/// Most messages from the caller that wait for the command, of at most 64 KiB each.
const MAX_INPUTS: usize = 16;

/// Orders the claims and fences of all tries of one run: by attempt, then by nonce. A shim
/// raises the attempt before each claim and each fence. The nonce belongs to the try.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct Ballot {
    pub attempt: u64,
    pub nonce: u64,
}

impl From<node::Ballot> for Ballot {
    fn from(node::Ballot { attempt, nonce }: node::Ballot) -> Self {
        Self { attempt, nonce }
    }
}

impl From<Ballot> for node::Ballot {
    fn from(Ballot { attempt, nonce }: Ballot) -> Self {
        Self { attempt, nonce }
    }
}

/// One run of this node, as seen by all but its carrier.
#[derive(Debug)]
pub struct Run {
    pub claimed: Claimed,
    /// When the claim arrived: zero of the timeline.
    arrived: Instant,
    progress: watch::Sender<Progress>,
    output: PerStream<Window>,
    /// Kept for the next life of the driver.
    manifest: Beside<Artifacts>,
    refreshed: Beside<Refreshed>,
    inputs: mpsc::Sender<Input>,
    /// Notified when the caller has read output: there may be room for more.
    room: Notify,
    /// Notified when an API has answered.
    answered: Notify,
    tools: tools::Calls,
    cancel: Cancel,
    /// Cancelled to end the run at once.
    kill: CancellationToken,
    /// Cancelled when its container is gone.
    gone: CancellationToken,
}

/// The progress of a run. Times count from the claim's arrival.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress {
    /// Init has connected, in this life of the driver.
    connected: bool,
    granted: Option<Granted>,
    started: Option<Duration>,
    /// For a prompt, in this life of the driver.
    form: Option<Form>,
    first_output: Option<Duration>,
    stdin_taken: u64,
    artifacts: Option<Arc<Artifacts>>,
    /// The last refreshed account that init reported.
    refreshed: Option<Refreshed>,
    /// `None` in a run of an earlier life of the driver, until the broker has reported.
    answers: Option<Arc<Answers>>,
    outcome: Option<Outcome>,
}

#[derive(Debug, Clone, Copy)]
pub struct Granted {
    pub granted_after: Duration,
    pub limits_raised_after: Duration,
}

#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    Ended(Ended),
    /// The command never ran.
    Aborted(Arc<Refusal>),
}

/// How a run ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ended {
    #[serde(with = "journal::reason")]
    pub reason: Reason,
    pub exit_code: i32,
    pub signal: i32,
    pub message: String,
    pub after: Duration,
    /// Time until the first byte of output; `None` without output.
    pub first_output_after: Option<Duration>,
    pub stdout_bytes: u64,
    pub stderr_bytes: u64,
    #[serde(default)]
    pub artifact_bytes: u64,
    /// Of what an agent has done. Omitted if zero, so that older drivers can read the record.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub event_bytes: u64,
    /// Processes that the kernel killed for want of memory. Omitted as `event_bytes` is.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub oom_kills: u64,
    /// Omitted if empty, so that older drivers can read the record.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub usage: Vec<ModelUsage>,
    /// As with `usage`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub api_errors: Vec<ApiError>,
    /// What it has connected to through the broker, and what it was not allowed to. Omitted if
    /// empty, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<Destination>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl Ended {
    /// Length of each stream.
    fn lengths(&self) -> PerStream<u64> {
        PerStream::new(
            self.stdout_bytes,
            self.stderr_bytes,
            self.artifact_bytes,
            self.event_bytes,
        )
    }
}

/// From the caller to the command.
#[derive(Debug)]
pub enum Input {
    Stdin { offset: u64, data: Bytes },
    CloseStdin,
    Signal(i32),
    Resize(TerminalSize),
}

impl Run {
    /// A run that was just claimed, and the receiving end of its input queue for the
    /// carrier.
    fn new(
        claimed: Claimed,
        arrived: Instant,
        windows: &Path,
        kill: CancellationToken,
    ) -> (Arc<Self>, mpsc::Receiver<Input>) {
        let output = PerStream::from_fn(|stream| {
            Window::new(windows.join(file_name(&claimed, stream.name())))
        });
        let progress = Progress {
            answers: Some(Arc::default()),
            ..Progress::default()
        };
        Self::with(claimed, arrived, windows, output, kill, progress)
    }

    fn with(
        claimed: Claimed,
        arrived: Instant,
        windows: &Path,
        output: PerStream<Window>,
        kill: CancellationToken,
        progress: Progress,
    ) -> (Arc<Self>, mpsc::Receiver<Input>) {
        let (inputs, queue) = mpsc::channel(MAX_INPUTS);
        let run = Self {
            manifest: Beside::new(windows, &claimed, "manifest"),
            refreshed: Beside::new(windows, &claimed, "refreshed"),
            claimed,
            arrived,
            progress: watch::Sender::new(progress),
            output,
            inputs,
            room: Notify::new(),
            answered: Notify::new(),
            tools: tools::Calls::default(),
            cancel: Cancel::default(),
            kill,
            gone: CancellationToken::new(),
        };
        (run.into(), queue)
    }

    /// What log lines about it belong to.
    pub(crate) fn span(&self) -> tracing::Span {
        let Claimed {
            run_id,
            user_id,
            slot_id,
            ..
        } = &self.claimed;
        tracing::info_span!("run", %run_id, %user_id, %slot_id)
    }

    /// In which form its prompt was started, in this life of the driver; `None` for an argv.
    pub(crate) fn form(&self) -> Option<Form> {
        self.progress.borrow().form.clone()
    }

    /// Ends the run at once.
    pub(crate) fn kill(&self) {
        self.kill.cancel();
    }

    /// Passes input to the command; false once the command takes no more. Waits while the
    /// command does not read.
    ///
    /// # Cancel safety
    /// The input being passed is lost.
    pub async fn input(&self, input: Input) -> bool {
        tokio::select! {
            sent = self.inputs.send(input) => sent.is_ok(),
            () = self.over() => false,
        }
    }

    /// Waits until the run is over, whatever its outcome.
    pub(crate) async fn over(&self) {
        let mut progress = self.progress.subscribe();
        // The sender is in `self`.
        let _over = progress
            .wait_for(|progress| progress.outcome.is_some())
            .await;
    }

    /// Waits until its progress is known.
    pub(crate) async fn known(&self) {
        let mut progress = self.progress.subscribe();
        // The sender is in `self`.
        let _known = progress
            .wait_for(|progress| progress.connected || progress.outcome.is_some())
            .await;
    }

    /// Waits until its container is gone.
    pub(crate) async fn gone(&self) {
        self.gone.cancelled().await;
    }

    /// Records that its container is gone.
    pub(crate) fn is_gone(&self) {
        self.gone.cancel();
    }

    pub(crate) fn is_over(&self) -> bool {
        self.progress.borrow().outcome.is_some()
    }

    /// Discards its output: nobody can ask for it any longer.
    fn release_output(&self) {
        for (_, window) in self.output.iter() {
            window.release();
        }
        self.manifest.release();
        self.refreshed.release();
    }

    fn update(&self, change: impl FnOnce(&mut Progress)) {
        self.progress.send_modify(change);
    }

    /// When a claim from an earlier life of the driver arrived.
    fn arrival(claimed: &Claimed) -> Instant {
        let (now, ago) = (Instant::now(), uptime().saturating_sub(claimed.uptime));
        now.checked_sub(ago).unwrap_or(now)
    }
}

/// The kernel's clock since boot, which cannot be set.
pub(crate) fn uptime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    // The value is never negative.
    Duration::try_from(now).unwrap_or_default()
}

/// Name of a run's file in the folder of the windows.
fn file_name(claimed: &Claimed, stream: &str) -> String {
    format!("{}.{stream}", claimed.run_id)
}
