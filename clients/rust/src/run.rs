//! One run as its caller sees it: a stream of events that no broken connection ends.

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
    runtime::{
        AttachRequest, AttachStart, Lost, Output, Prompt, RunEvent, RunRequest, RunStart,
        Stream as Which, attach_request, input_file::Source, run_event::Event, run_request,
        run_start::Command,
    },
};
use tokio::{sync::watch, time::sleep};
use tonic::{Code, Status};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::{Calls, Input};
use polydev_transport::backoff::Backoff;

/// How long a run is tried to be reached again.
const RETRY_TIMEOUT: Duration = Duration::from_secs(60);
/// As long as it is not known whether there is one.
const FIRST_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two tries at first, and at most.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// A shim hands its runs over.
const STOPPING: &str = "STOPPING";

/// A run: the stream of its events. `accepted` comes once, every byte once and in order, and
/// `exited` last. When the connection breaks, or the shim is restarted, it goes on where it was;
/// after a minute without an answer (ten seconds, if it was not accepted yet) it ends with the
/// last error. Dropping it leaves the run to
/// itself.
pub struct Run {
    run_id: String,
    input: Input,
    events: BoxStream<'static, Result<Event, Status>>,
    reached: watch::Receiver<bool>,
}

impl Run {
    pub(crate) fn start(calls: Calls, mut start: RunStart) -> Self {
        // An id that was given may have been tried before, unless it is said that it was not.
        let least = if start.run_id.is_empty() { 1 } else { 2 };
        if start.attempt == 0 {
            start.attempt = least;
        }
        if start.run_id.is_empty() {
            start.run_id = if start.lease_id.is_empty() {
                Uuid::now_v7().to_string()
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
        Self::new(calls, run_id, input, [0; 3], Some(start), String::new())
    }

    pub(crate) fn attach(calls: Calls, start: AttachStart) -> Self {
        let AttachStart {
            run_id,
            user_id,
            stdout_offset,
            stderr_offset,
            artifact_offset,
        } = start;
        let offsets = [stdout_offset, stderr_offset, artifact_offset];
        Self::new(calls, run_id, Input::of_attach(), offsets, None, user_id)
    }

    fn new(
        calls: Calls,
        run_id: String,
        input: Input,
        read: [u64; 3],
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

    /// False while it is tried to be reached again, as the last event that was asked for has
    /// found out.
    #[must_use]
    pub fn reached(&self) -> watch::Receiver<bool> {
        self.reached.clone()
    }

    /// The way to its command.
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

/// What one run has come to, over all calls about it.
struct Session {
    calls: Calls,
    run_id: String,
    user_id: String,
    /// `None` for a run that somebody else has started.
    start: Option<RunStart>,
    input: Input,
    call: Option<Call>,
    /// `accepted` was told.
    accepted: bool,
    /// `started` was.
    started: bool,
    told_artifacts: bool,
    /// How much of stdout, stderr and artifacts the caller has.
    read: [u64; 3],
    /// Since when the shim does not answer.
    broken: Option<Instant>,
    /// Before the next call, unless it is the first.
    retry: Backoff,
    over: bool,
    reached: watch::Sender<bool>,
}

/// The shim has input of its own for it, also after it has started: a prompt that is the CLI's
/// stdin.
fn is_read_by_the_shim(start: &RunStart) -> bool {
    matches!(&start.command, Some(Command::Prompt(Prompt { text, .. })) if text.len() > exec::PROMPT_IN_ARGV)
}

impl Drop for Session {
    /// Whoever still writes is told when nobody reads the run any more.
    fn drop(&mut self) {
        // First the answers, so that the end of the requests does not close the command's stdin.
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

    /// What comes next from the call that is open, or is opened; `None` if it is nothing new.
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

    /// Begins a call: the first, or one that goes on with the run.
    async fn open(&mut self) -> Result<Call, Status> {
        let number = self.input.next_call();
        let input = self.input.clone();
        let inputs = stream::unfold(input, move |input| async move {
            Some((input.next(number).await?, input))
        });
        let mut calls = self.calls.clone();
        // A run that exists is attached to by that as well, from its first byte. The shim that
        // broke may have had some of what it reads.
        let start = self.start.as_mut();
        if let Some(start) = start.filter(|start| !self.started || is_read_by_the_shim(start)) {
            let first = run_request::Message::Start(Box::new(start.clone()));
            // Whatever becomes of this call, the next one is another try.
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
        let [stdout_offset, stderr_offset, artifact_offset] = self.read;
        let first = attach_request::Message::Start(AttachStart {
            run_id: self.run_id.clone(),
            user_id: self.user_id.clone(),
            stdout_offset,
            stderr_offset,
            artifact_offset,
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

    /// What of an event is new, which shows that somebody answers.
    fn news(&mut self, event: Event) -> Result<Option<Event>, Status> {
        if matches!(event, Event::Accepted(_) | Event::Queued(_)) {
            self.broken = None;
            self.tell_reached(true);
        }
        let news = self.only_news(event)?;
        // One that breaks again and again before there is anything is not asked at once.
        if news.is_some() {
            self.retry.reset();
        }
        Ok(news)
    }

    /// What of an event the caller does not have yet.
    fn only_news(&mut self, event: Event) -> Result<Option<Event>, Status> {
        Ok(match event {
            Event::Accepted(accepted) => {
                let went_on = self.input.go_on(&accepted);
                went_on.map_err(|gone| Status::data_loss(gone.to_string()))?;
                let is_first = !std::mem::replace(&mut self.accepted, true);
                is_first.then_some(Event::Accepted(accepted))
            }
            Event::Queued(_) if self.accepted => None,
            Event::Started(started) => {
                let is_first = !std::mem::replace(&mut self.started, true);
                is_first.then_some(Event::Started(started))
            }
            Event::Stdout(output) => self.output(0, output)?.map(Event::Stdout),
            Event::Stderr(output) => self.output(1, output)?.map(Event::Stderr),
            Event::ArtifactData(output) => self.output(2, output)?.map(Event::ArtifactData),
            Event::Artifacts(artifacts) => {
                let is_first = !std::mem::replace(&mut self.told_artifacts, true);
                is_first.then_some(Event::Artifacts(artifacts))
            }
            Event::Lost(lost) => self.lost(lost).map(Event::Lost),
            event @ (Event::Queued(_) | Event::Exited(_)) => Some(event),
        })
    }

    fn output(&mut self, stream: usize, mut output: Output) -> Result<Option<Output>, Status> {
        let read = &mut self.read[stream];
        let end = output.offset + output.data.len() as u64;
        if output.offset > *read {
            let at = output.offset;
            let words = format!("the shim goes on at byte {at} after byte {read}");
            return Err(Status::data_loss(words));
        }
        if end <= *read {
            return Ok(None);
        }
        // Less than the length of its data.
        let had = usize::try_from(*read - output.offset).unwrap_or(0);
        output.offset = std::mem::replace(read, end);
        output.data = output.data.split_off(had);
        Ok(Some(output))
    }

    fn lost(&mut self, mut lost: Lost) -> Option<Lost> {
        let read = match lost.stream() {
            Which::Stdout => &mut self.read[0],
            Which::Stderr => &mut self.read[1],
            Which::Artifacts => &mut self.read[2],
            Which::Unspecified => return Some(lost),
        };
        if lost.to <= *read {
            return None;
        }
        lost.from = lost.from.max(*read);
        *read = lost.to;
        Some(lost)
    }

    /// Whether another call may bring what this one did not.
    fn may_go_on(&self, status: &Status) -> bool {
        let details = status.get_error_details();
        let is_ours = details.error_info().is_some();
        let may_pass = match status.code() {
            // The connection's, and not the shim's words.
            Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled if !is_ours => {
                true
            }
            // The shim has lost the node: what became of the run is to be asked for.
            Code::Aborted if is_ours => true,
            // Worth another try for a run that exists; a first call is its caller's to repeat.
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
