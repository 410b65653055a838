//! One run: what it has read and printed, and how it ended.

use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use polydev_proto::{
    init::{Artifact, Artifacts},
    node::{self, Claim, Ended, RunInput, Slot, Stdin, run, run_input::Input},
};
use prost_types::Timestamp;
use tokio::sync::{broadcast, watch};

pub(super) struct Run {
    pub(super) claim: Claim,
    pub(super) slot: Slot,
    claimed_at: SystemTime,
    pub(super) arrived: Instant,
    pub(super) progress: watch::Sender<Progress>,
    /// Reports each step of this run to the watchers of the node's runs.
    steps: broadcast::Sender<String>,
}

#[derive(Debug, Default)]
pub(super) struct Progress {
    /// The bytes of its files, then its stdin.
    pub(super) input: Vec<u8>,
    pub(super) closed: bool,
    signals: Vec<i32>,
    pub(super) started_after: Option<Duration>,
    /// Stdout, stderr and the artifacts' bytes.
    pub(super) output: [Vec<u8>; 3],
    pub(super) first_output_after: Option<Duration>,
    pub(super) files: Vec<Artifact>,
    /// The artifacts, once they are known and if the caller asked for them.
    pub(super) artifacts: Option<Artifacts>,
    pub(super) cancelled: Option<String>,
    pub(super) ended: Option<Ended>,
    /// The run's claim was given up.
    pub(super) given_up: bool,
}

impl Progress {
    fn is_over(&self) -> bool {
        self.ended.is_some() || self.given_up
    }
}

/// A duration in the wire format.
pub(super) fn wire(duration: Duration) -> Option<prost_types::Duration> {
    duration.try_into().ok()
}

impl Run {
    /// A run that has done nothing.
    pub(super) fn new(claim: Claim, slot: Slot, steps: broadcast::Sender<String>) -> Self {
        let reads = claim.spec.as_ref().is_some_and(|spec| spec.stdin);
        let progress = Progress {
            closed: !reads,
            ..Progress::default()
        };
        Self {
            claim,
            slot,
            claimed_at: SystemTime::now(),
            arrived: Instant::now(),
            progress: watch::Sender::new(progress),
            steps,
        }
    }

    pub(super) fn files_bytes(&self) -> u64 {
        let files = self.claim.spec.iter().flat_map(|spec| &spec.files);
        files.map(|file| file.size).sum()
    }

    pub(super) fn read(&self) -> Vec<u8> {
        self.progress.borrow().input.clone()
    }

    pub(super) fn signals(&self) -> Vec<i32> {
        self.progress.borrow().signals.clone()
    }

    pub(super) fn cancel(&self, reason: &str) {
        self.progress.send_modify(|progress| {
            progress.cancelled.get_or_insert_with(|| reason.to_owned());
        });
        self.step();
    }

    pub(super) fn give_up(&self) {
        self.progress
            .send_modify(|progress| progress.given_up = true);
    }

    /// Takes input that the run does not have yet.
    pub(super) fn input(&self, input: RunInput) {
        self.progress.send_modify(|progress| match input.input {
            Some(Input::Stdin(Stdin { offset, data })) => {
                let known = (progress.input.len() as u64).saturating_sub(offset);
                let known = usize::try_from(known).unwrap_or(usize::MAX);
                progress.input.extend(data.iter().skip(known));
            }
            Some(Input::CloseStdin(_)) => progress.closed = true,
            Some(Input::Signal(signal)) => progress.signals.push(signal.number),
            Some(Input::Resize(_)) | None => {}
        });
    }

    /// Waits until the run sends nothing more.
    pub(super) async fn over(&self) {
        self.until(Progress::is_over).await;
    }

    pub(super) async fn until(&self, reached: impl FnMut(&Progress) -> bool) {
        let mut changes = self.progress.subscribe();
        // The channel stays open: `self` has the sender.
        drop(changes.wait_for(reached).await);
    }

    pub(super) fn step(&self) {
        let _nobody_watches = self.steps.send(self.claim.run_id.clone());
    }

    /// The run as its node lists it.
    pub(super) fn describe(&self) -> node::Run {
        let progress = self.progress.borrow();
        let state = match (&progress.ended, progress.started_after) {
            (Some(_), _) => run::State::Ended,
            (None, Some(_)) => run::State::Running,
            (None, None) => run::State::Claimed,
        };
        node::Run {
            run_id: self.claim.run_id.clone(),
            user_id: self.claim.user_id.clone(),
            provider: self.slot.provider.clone(),
            slot_id: self.slot.slot_id.clone(),
            generation: self.slot.generation,
            on_demand: !self.slot.for_run_id.is_empty(),
            state: state.into(),
            claimed_at: Some(Timestamp::from(self.claimed_at)),
            started_after: progress.started_after.and_then(wire),
            ended: progress.ended.clone(),
            stdout_bytes: progress.output[0].len() as u64,
            stderr_bytes: progress.output[1].len() as u64,
            cancelled: progress.cancelled.is_some(),
            usage: Vec::new(),
            api_errors: Vec::new(),
            egress: Vec::new(),
        }
    }

    /// A piece of one of the run's streams, from an offset; empty at the end.
    pub(super) fn piece(progress: &Progress, stream: usize, offset: u64) -> Bytes {
        let output = &progress.output[stream];
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let from = from.min(output.len());
        let to = output.len().min(from + (64 << 10));
        Bytes::copy_from_slice(&output[from..to])
    }
}
