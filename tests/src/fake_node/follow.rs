//! Reports the events of a run to a shim, from an offset of each stream.

use std::{sync::Arc, time::Duration};

use futures_util::{Stream, stream};
use polydev_proto::node::{
    Attached, Granted, Output, RunEvent, Started, StdinTaken, run_event::Event,
};
use tokio::sync::watch;
use tonic::Status;

use super::run::{Progress, Run, wire};

/// The time from a claim's arrival until it is granted and its limits are raised.
const GRANTED: Duration = Duration::from_millis(1);

/// The events of a run that one shim has received.
pub(super) struct Follower {
    run: Arc<Run>,
    progress: watch::Receiver<Progress>,
    /// The offsets of stdout, stderr and the artifacts.
    offsets: [u64; 3],
    taken: u64,
    attached: bool,
    granted: bool,
    started: bool,
    artifacts: bool,
    over: bool,
}

impl Follower {
    /// # Errors
    /// OUT_OF_RANGE if an offset is beyond what the run has written.
    pub(super) fn new(run: Arc<Run>, offsets: [u64; 3]) -> Result<Self, Status> {
        let progress = run.progress.subscribe();
        let (taken, written) = {
            let now = progress.borrow();
            let written = [0, 1, 2].map(|stream| now.output[stream].len() as u64);
            (now.input.len() as u64, written)
        };
        if offsets
            .iter()
            .zip(written)
            .any(|(offset, end)| *offset > end)
        {
            let words = "an offset is beyond what the run has written";
            return Err(Status::out_of_range(words));
        }
        Ok(Self {
            run,
            progress,
            offsets,
            taken,
            attached: false,
            granted: false,
            started: false,
            artifacts: false,
            over: false,
        })
    }

    /// The events so far, and then all later ones.
    pub(super) fn events(self) -> impl Stream<Item = Result<RunEvent, Status>> + Send {
        stream::unfold(self, |mut follower| async move {
            loop {
                if follower.over {
                    return None;
                }
                if let Some(event) = follower.look() {
                    let event = event.map(|event| RunEvent { event: Some(event) });
                    return Some((event, follower));
                }
                // The channel stays open: the run has the sender.
                follower.progress.changed().await.ok()?;
            }
        })
    }

    /// The next event, if it has already happened.
    fn look(&mut self) -> Option<Result<Event, Status>> {
        let progress = self.progress.borrow_and_update();
        if progress.given_up {
            self.over = true;
            let words = "the driver died before the command was started";
            return Some(Err(Status::failed_precondition(words)));
        }
        if !std::mem::replace(&mut self.attached, true) {
            return Some(Ok(Event::Attached(Attached {
                slot_id: self.run.slot.slot_id.clone(),
                generation: self.run.slot.generation,
                stdin_offset: self.taken,
                on_demand: !self.run.slot.for_run_id.is_empty(),
                files_bytes: self.run.files_bytes(),
            })));
        }
        if !std::mem::replace(&mut self.granted, true) {
            return Some(Ok(Event::Granted(Granted {
                granted_after: wire(GRANTED),
                limits_raised_after: wire(GRANTED),
            })));
        }
        let taken = progress.input.len() as u64;
        if taken > self.taken {
            self.taken = taken;
            return Some(Ok(Event::StdinTaken(StdinTaken { offset: taken })));
        }
        if let (Some(after), false) = (progress.started_after, self.started) {
            self.started = true;
            let after = wire(after);
            return Some(Ok(Event::Started(Started { after, form: None })));
        }
        for (stream, wrap) in [Event::Stdout, Event::Stderr].into_iter().enumerate() {
            if let Some(output) = next(&progress, stream, &mut self.offsets) {
                return Some(Ok(wrap(output)));
            }
        }
        if let (Some(artifacts), false) = (&progress.artifacts, self.artifacts) {
            self.artifacts = true;
            return Some(Ok(Event::Artifacts(artifacts.clone())));
        }
        if self.artifacts
            && let Some(output) = next(&progress, 2, &mut self.offsets)
        {
            return Some(Ok(Event::ArtifactData(output)));
        }
        let ended = progress.ended.clone()?;
        self.over = true;
        Some(Ok(Event::Ended(ended)))
    }
}

fn next(progress: &Progress, stream: usize, offsets: &mut [u64; 3]) -> Option<Output> {
    let offset = offsets[stream];
    let data = Run::piece(progress, stream, offset);
    if data.is_empty() {
        return None;
    }
    offsets[stream] += data.len() as u64;
    Some(Output { offset, data })
}
