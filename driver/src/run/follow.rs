//! The events that one caller of a run receives, from its offsets to the end. The next
//! event is produced only after the previous one was sent. So a slow caller slows down the
//! command, and nothing is queued here.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use polydev_proto::{
    broker::{ApiError, Destination},
    frame::MAX_DATA,
    init::{Artifacts, Form},
    node::ended::Reason,
    stream::{PerStream, Stream},
};
use tokio::sync::watch;

use super::{Ended, Granted, Outcome, Progress, Run, claim::Refusal, window::Piece};

/// An event of one run. `Granted` comes first, then `Started`, then output of stdout and
/// stderr, then `Artifacts` and their output, then `Ended`. `Lost` takes the place of output
/// that is not kept. `StdinTaken`, `ApiErrors` and `EgressDenied` come at any time after
/// `Granted`.
#[derive(Debug)]
pub enum Event {
    Granted(Granted),
    Started {
        after: Duration,
        /// For a prompt.
        form: Option<Form>,
    },
    /// Comes before the first output of the artifacts' stream.
    Artifacts(Arc<Artifacts>),
    Output {
        stream: Stream,
        offset: u64,
        data: Bytes,
    },
    /// Bytes that are no longer kept.
    Lost {
        stream: Stream,
        from: u64,
        to: u64,
    },
    /// All errors of APIs so far; sent when there is a new one.
    ApiErrors(Vec<ApiError>),
    /// All destinations that the run was not allowed; sent when there is a new one.
    EgressDenied(Vec<Destination>),
    /// How much of the input is taken.
    StdinTaken {
        offset: u64,
    },
    /// The last event.
    Ended(Ended),
    /// Also a last event: nothing ran.
    Aborted(Arc<Refusal>),
}

/// The caller requested bytes that the command has not written.
#[derive(Debug, thiserror::Error)]
#[error("`{field}` is {given}, but the command has written only {end} bytes")]
pub struct BeyondEnd {
    field: &'static str,
    given: u64,
    end: u64,
}

/// The streams that take turns: a long one does not keep a caller from the others.
const TURNS: [Stream; 3] = [Stream::Stdout, Stream::Stderr, Stream::Events];

/// One caller's progress through a run.
#[derive(Debug)]
pub struct Follower {
    run: Arc<Run>,
    progress: watch::Receiver<Progress>,
    /// The offset of the next byte of each stream.
    offsets: PerStream<u64>,
    granted: bool,
    started: bool,
    stdin_taken: u64,
    /// How many errors of APIs were sent.
    api_errors: u64,
    /// How many destinations that are not allowed were sent.
    egress_denied: usize,
    /// Whether the list of artifacts was sent.
    artifacts: bool,
    /// The last of [`TURNS`].
    turn: usize,
    over: bool,
}

impl Follower {
    /// # Errors
    /// [`BeyondEnd`]
    pub fn new(run: Arc<Run>, offsets: PerStream<u64>) -> Result<Self, BeyondEnd> {
        let lengths = match &run.progress.borrow().outcome {
            // The length of its output is unknown.
            Some(Outcome::Ended(ended)) if ended.reason == Reason::Lost => {
                PerStream::from([u64::MAX; 4])
            }
            Some(Outcome::Ended(ended)) => ended.lengths(),
            _ => PerStream::default(),
        };
        for (stream, window) in run.output.iter() {
            let (given, end) = (offsets[stream], window.end().max(lengths[stream]));
            if given > end {
                let field = match stream {
                    Stream::Stdout => "stdout_offset",
                    Stream::Stderr => "stderr_offset",
                    Stream::Artifacts => "artifact_offset",
                    Stream::Events => "event_offset",
                };
                return Err(BeyondEnd { field, given, end });
            }
        }
        Ok(Self {
            progress: run.progress.subscribe(),
            run,
            offsets,
            granted: false,
            started: false,
            stdin_taken: 0,
            api_errors: 0,
            egress_denied: 0,
            artifacts: false,
            turn: 0,
            over: false,
        })
    }

    /// How much of the input is taken.
    #[must_use]
    pub fn stdin_taken(&self) -> u64 {
        self.progress.borrow().stdin_taken
    }

    /// The next event; `None` after the last. Calling this confirms that the previous event
    /// was sent.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn next(&mut self) -> Option<Event> {
        for (stream, window) in self.run.output.iter() {
            window.deliver(self.offsets[stream]);
        }
        self.run.room.notify_one();
        while !self.over {
            // Read before the windows, which then contain everything that an end announces.
            let progress = self.progress.borrow_and_update().clone();
            if let Some(event) = self.news(&progress) {
                return Some(event);
            }
            if self.progress.changed().await.is_err() {
                unreachable!("`self` holds the run, which holds the sender");
            }
        }
        None
    }

    fn news(&mut self, progress: &Progress) -> Option<Event> {
        if let Some(granted) = progress.granted
            && !std::mem::replace(&mut self.granted, true)
        {
            return Some(Event::Granted(granted));
        }
        if let Some(after) = progress.started
            && !std::mem::replace(&mut self.started, true)
        {
            let form = progress.form.clone();
            return Some(Event::Started { after, form });
        }
        if progress.stdin_taken > self.stdin_taken {
            self.stdin_taken = progress.stdin_taken;
            let offset = self.stdin_taken;
            return Some(Event::StdinTaken { offset });
        }
        let answers = progress.answers();
        let errors = &answers.errors;
        let count = errors.iter().map(|error| error.count).sum();
        if count > self.api_errors {
            self.api_errors = count;
            return Some(Event::ApiErrors(errors.clone()));
        }
        let denied = answers
            .egress
            .iter()
            .filter(|known| !known.denied.is_empty());
        let count = denied.clone().count();
        if count > self.egress_denied {
            self.egress_denied = count;
            return Some(Event::EgressDenied(denied.cloned().collect()));
        }
        for _ in 0..TURNS.len() {
            self.turn = (self.turn + 1) % TURNS.len();
            if let Some(event) = self.output(TURNS[self.turn]) {
                return Some(event);
            }
        }
        if let Some(artifacts) = &progress.artifacts {
            if !std::mem::replace(&mut self.artifacts, true) {
                return Some(Event::Artifacts(artifacts.clone()));
            }
            if let Some(event) = self.output(Stream::Artifacts) {
                return Some(event);
            }
        }
        match progress.outcome.clone()? {
            Outcome::Aborted(refusal) => {
                self.over = true;
                Some(Event::Aborted(refusal))
            }
            Outcome::Ended(ended) => {
                for (stream, to) in ended.lengths().iter() {
                    let to = *to;
                    let from = self.offsets[stream];
                    if from < to {
                        self.offsets[stream] = to;
                        return Some(Event::Lost { stream, from, to });
                    }
                }
                self.over = true;
                Some(Event::Ended(ended))
            }
        }
    }

    fn output(&mut self, stream: Stream) -> Option<Event> {
        let offset = self.offsets[stream];
        match self.run.output[stream].read(offset, MAX_DATA) {
            Ok(Piece::Bytes(data)) => {
                self.offsets[stream] += data.len() as u64;
                Some(Event::Output {
                    stream,
                    offset,
                    data,
                })
            }
            Ok(Piece::Gap { to }) => {
                self.offsets[stream] = to;
                let from = offset;
                Some(Event::Lost { stream, from, to })
            }
            Ok(Piece::End) => None,
            Err(error) => {
                tracing::error!(run_id = %self.run.claimed.run_id, %error, "cannot read output");
                None
            }
        }
    }
}
