//! One run as its caller sees it. Its events continue when a connection breaks.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use polydev_proto::{
    exec,
    id::RunId,
    runtime::{
        AttachRequest, AttachStart, Lost, Output, Prompt, RunEvent, RunRequest, RunStart,
        attach_request, input_file::Source, run_event::Event, run_request, run_start::Command,
    },
    stream::{PerStream, Stream as Which},
};
use tokio::{sync::watch, time::sleep};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::{Calls, Input};
use polydev_transport::backoff::Backoff;

/// How long the client tries to reach an accepted run again.
const RETRY_TIMEOUT: Duration = Duration::from_secs(60);
/// The same for a run that is not accepted yet.
const FIRST_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two tries: the first value, and the largest.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Reason of a shim that is stopping: its runs continue through another shim.
const STOPPING: &str = "STOPPING";

/// A run: the stream of its events. `accepted` comes once, every byte comes once and in order, and
/// `exited` comes last. When the connection breaks or the shim restarts, the events continue where
/// they stopped. After one minute without an answer the stream ends with the last error; after ten
/// seconds, if the run was not accepted yet. When the stream is dropped, an accepted run continues
/// without the caller, and a run that still waits for a slot is given up.
pub struct Run {
    run_id: String,
    input: Input,
    events: BoxStream<'static, Result<Event, Status>>,
    reached: watch::Receiver<bool>,
}

impl Run {
    pub(crate) fn start(calls: Calls, mut start: RunStart) -> Self {
        // A given id may have been tried before, unless `attempt` says that it was not.
        let least = if start.run_id.is_empty() { 1 } else { 2 };
        if start.attempt == 0 {
            start.attempt = least;
        }
        if start.run_id.is_empty() {
            start.run_id = if start.lease_id.is_empty() {
                RunId::now().into()
            } else {
                start.lease_id.clone()
            };
        }
        let run_id = start.run_id.clone();
        let size = |source: &Option<Source>| match source {
            Some(Source::Size(size)) => *size,
            Some(Source::Content(_)) | None => 0,
        };
        let files = start.files.iter().map(|file| size(&file.source)).sum();
        let input = Input::of_run(files, start.attempt == 1);
        let read = PerStream::default();
        Self::new(calls, run_id, input, read, Some(start), String::new())
    }

    pub(crate) fn attach(calls: Calls, start: AttachStart) -> Self {
        let AttachStart {
            run_id,
            user_id,
            stdout_offset,
            stderr_offset,
            artifact_offset,
            event_offset,
        } = start;
        let offsets = PerStream::new(stdout_offset, stderr_offset, artifact_offset, event_offset);
        Self::new(calls, run_id, Input::of_attach(), offsets, None, user_id)
    }

    fn new(
        calls: Calls,
        run_id: String,
        input: Input,
        read: PerStream<u64>,
        start: Option<RunStart>,
        user_id: String,
    ) -> Self {
        let session = Session {
            calls,
            user_id: start
                .as_ref()
                .map_or(user_id, |start| start.user_id.clone()),
            run_id: run_id.clone(),
            start,
            input: input.clone(),
            call: None,
            accepted: false,
            started: false,
            told_artifacts: false,
            told_api_errors: 0,
            told_denied: 0,
            read,
            broken: None,
            retry: Backoff::new(RETRY_INTERVAL, MAX_RETRY_INTERVAL),
            over: false,
            reached: watch::Sender::new(true),
        };
        let reached = session.reached.subscribe();
        let events = stream::unfold(session, |mut session| async {
            let event = session.next().await?;
            Some((event, session))
        });
        Self {
            run_id,
            input,
            events: events.boxed(),
            reached,
        }
    }

    /// The run's UUID.
    #[must_use]
    pub fn run_id(&self) -> &str {
        &self.run_id
    }

    /// Whether the run is connected: false while the client tries to reach it again. Changes only
    /// while the caller asks for events.
    #[must_use]
    pub fn reached(&self) -> watch::Receiver<bool> {
        self.reached.clone()
    }

    /// The input of the command.
    #[must_use]
    pub fn input(&self) -> Input {
        self.input.clone()
    }
}

impl Stream for Run {
    type Item = Result<Event, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.poll_next_unpin(context)
    }
}

type Call = BoxStream<'static, Result<Option<RunEvent>, Status>>;

/// The state of one run over all its calls.
struct Session {
    calls: Calls,
    run_id: String,
    user_id: String,
    /// `None` for a run that another client has started.
    start: Option<RunStart>,
    input: Input,
    call: Option<Call>,
    /// The caller has got `accepted`.
    accepted: bool,
    /// The caller has got `started`.
    started: bool,
    told_artifacts: bool,
    /// How many.
    told_api_errors: u64,
    /// Destinations that are not allowed.
    told_denied: usize,
    /// How much of stdout, stderr and artifacts the caller has.
    read: PerStream<u64>,
    /// Since when the shim has not answered.
    broken: Option<Instant>,
    /// The wait before the next call, unless it is the first.
    retry: Backoff,
    over: bool,
    reached: watch::Sender<bool>,
}

/// Whether the shim still gives the command input after its start: a prompt that the CLI reads
/// from stdin.
fn is_read_by_the_shim(start: &RunStart) -> bool {
    matches!(&start.command, Some(Command::Prompt(Prompt { text, .. })) if text.len() > exec::PROMPT_IN_ARGV)
}

impl Drop for Session {
    /// Writers of input get an error when the run is dropped.
    fn drop(&mut self) {
        // Drops the responses first: otherwise the end of the requests closes the command's stdin.
        self.call = None;
        self.input.end();
    }
}

impl Session {
    /// The next event; `None` after the last.
    async fn next(&mut self) -> Option<Result<Event, Status>> {
        while !self.over {
            match self.step().await {
                Ok(Some(event)) => {
                    self.over = matches!(event, Event::Exited(_));
                    if self.over {
                        self.input.end();
                    }
                    return Some(Ok(event));
                }
                Ok(None) => {}
                Err(status) if self.may_go_on(&status) => self.broke(),
                Err(status) => {
                    self.over = true;
                    self.input.end();
                    return Some(Err(status));
                }
            }
        }
        None
    }

    /// Reads the next event of the open call, or of a new call; `None` if the event is not new.
    async fn step(&mut self) -> Result<Option<Event>, Status> {
        let call = match &mut self.call {
            Some(call) => call,
            None => {
                if self.broken.is_some() {
                    sleep(self.retry.next_wait()).await;
                }
                let call = self.open().await?;
                self.call.insert(call)
            }
        };
        let event = call.next().await.unwrap_or_else(|| {
            let words = "the shim ended the stream before the run's end";
            Err(Status::unavailable(words))
        })?;
        match event.and_then(|event| event.event) {
            Some(event) => self.news(event),
            None => Ok(None),
        }
    }

    /// Begins the first call, or a call that continues the run.
    async fn open(&mut self) -> Result<Call, Status> {
        let number = self.input.next_call();
        let input = self.input.clone();
        let inputs = stream::unfold(input, move |input| async move {
            Some((input.next(number).await?, input))
        });
        let mut calls = self.calls.clone();
        // If the run exists, `Run` also attaches to it, from its first byte. The previous shim may
        // have had part of its input.
        let start = self.start.as_mut();
        if let Some(start) = start.filter(|start| !self.started || is_read_by_the_shim(start)) {
            let first = run_request::Message::Start(Box::new(start.clone()));
            // Whatever happens to this call, the next one is another try.
            start.attempt = start.attempt.saturating_add(1);
            let inputs = inputs.map(run_request::Message::Input);
            let requests = stream::iter([first])
                .chain(inputs)
                .map(|message| RunRequest {
                    message: Some(message),
                });
            let events = calls.run(requests).await?.into_inner();
            return Ok(events.map(|response| Ok(response?.event)).boxed());
        }
        let first = attach_request::Message::Start(AttachStart {
            run_id: self.run_id.clone(),
            user_id: self.user_id.clone(),
            stdout_offset: self.read[Which::Stdout],
            stderr_offset: self.read[Which::Stderr],
            artifact_offset: self.read[Which::Artifacts],
            event_offset: self.read[Which::Events],
        });
        let inputs = inputs.map(attach_request::Message::Input);
        let requests = stream::iter([first])
            .chain(inputs)
            .map(|message| AttachRequest {
                message: Some(message),
            });
        let events = calls.attach(requests).await?.into_inner();
        Ok(events.map(|response| Ok(response?.event)).boxed())
    }

    /// The new part of an event. Also notes that the shim answers.
    fn news(&mut self, event: Event) -> Result<Option<Event>, Status> {
        if matches!(
            event,
            Event::Accepted(_) | Event::Queued(_) | Event::ApprovalRequired(_)
        ) {
            self.broken = None;
            self.tell_reached(true);
        }
        let news = self.only_news(event)?;
        // Calls that break before anything new arrives do not shorten the wait.
        if news.is_some() {
            self.retry.reset();
        }
        Ok(news)
    }

    /// The part of an event that the caller does not have yet; `None` if there is none.
    fn only_news(&mut self, event: Event) -> Result<Option<Event>, Status> {
        Ok(match event {
            Event::Accepted(accepted) => {
                let went_on = self.input.go_on(&accepted);
                went_on.map_err(|gone| Status::data_loss(gone.to_string()))?;
                let is_first = !std::mem::replace(&mut self.accepted, true);
                is_first.then_some(Event::Accepted(accepted))
            }
            Event::Queued(_) | Event::ApprovalRequired(_) if self.accepted => None,
            Event::Started(started) => {
                let is_first = !std::mem::replace(&mut self.started, true);
                is_first.then_some(Event::Started(started))
            }
            Event::Stdout(output) => self.output(Which::Stdout, output)?.map(Event::Stdout),
            Event::Stderr(output) => self.output(Which::Stderr, output)?.map(Event::Stderr),
            Event::ArtifactData(output) => {
                let new = self.output(Which::Artifacts, output)?;
                new.map(Event::ArtifactData)
            }
            Event::Artifacts(artifacts) => {
                let is_first = !std::mem::replace(&mut self.told_artifacts, true);
                is_first.then_some(Event::Artifacts(artifacts))
            }
            // A caller gets whole ones, and continues after the last.
            Event::AgentEvents(told) => {
                let read = &mut self.read[Which::Events];
                let is_new = told.end_offset > *read;
                *read = told.end_offset.max(*read);
                is_new.then_some(Event::AgentEvents(told))
            }
            Event::Lost(lost) => self.lost(lost).map(Event::Lost),
            Event::ApiErrors(errors) => {
                let count: u64 = errors.errors.iter().map(|error| error.count).sum();
                let is_new = count > self.told_api_errors;
                self.told_api_errors = count.max(self.told_api_errors);
                is_new.then_some(Event::ApiErrors(errors))
            }
            Event::EgressDenied(mut denied) => {
                let told = self.told_denied.min(denied.destinations.len());
                denied.destinations.drain(..told);
                self.told_denied += denied.destinations.len();
                let is_new = !denied.destinations.is_empty();
                is_new.then_some(Event::EgressDenied(denied))
            }
            event @ (Event::Queued(_) | Event::ApprovalRequired(_) | Event::Exited(_)) => {
                Some(event)
            }
        })
    }

    fn output(&mut self, stream: Which, mut output: Output) -> Result<Option<Output>, Status> {
        let read = &mut self.read[stream];
        let end = output.offset + output.data.len() as u64;
        if output.offset > *read {
            let at = output.offset;
            let words = format!("the shim continues at byte {at} after byte {read}");
            return Err(Status::data_loss(words));
        }
        if end <= *read {
            return Ok(None);
        }
        // Less than the length of `output.data`.
        let had = usize::try_from(*read - output.offset).unwrap_or(0);
        output.offset = std::mem::replace(read, end);
        output.data = output.data.split_off(had);
        Ok(Some(output))
    }

    fn lost(&mut self, mut lost: Lost) -> Option<Lost> {
        let Some(stream) = Which::of_number(lost.stream) else {
            return Some(lost);
        };
        let read = &mut self.read[stream];
        if lost.to <= *read {
            return None;
        }
        lost.from = lost.from.max(*read);
        *read = lost.to;
        Some(lost)
    }

    /// Whether another call may succeed after this error.
    fn may_go_on(&self, status: &Status) -> bool {
        let details = status.get_error_details();
        let is_ours = details.error_info().is_some();
        let may_pass = match status.code() {
            // The connection's error, not the shim's.
            Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled if !is_ours => {
                true
            }
            // The shim has lost the node, so the client must ask what happened to the run.
            Code::Aborted if is_ours => true,
            // Repeat the call for a run that exists. The caller decides whether to repeat a first
            // call.
            _ => {
                let is_stopping = details
                    .error_info()
                    .is_some_and(|info| info.reason == STOPPING);
                let exists = self.accepted || self.broken.is_some() || is_stopping;
                exists && details.retry_info().is_some()
            }
        };
        let patience = if self.accepted {
            RETRY_TIMEOUT
        } else {
            FIRST_TIMEOUT
        };
        may_pass && self.broken.is_none_or(|since| since.elapsed() < patience)
    }

    fn tell_reached(&self, reached: bool) {
        self.reached
            .send_if_modified(|last| std::mem::replace(last, reached) != reached);
    }

    fn broke(&mut self) {
        self.call = None;
        self.broken.get_or_insert_with(Instant::now);
        self.tell_reached(false);
    }
}
