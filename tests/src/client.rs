//! A caller of the shim, like a master-controller.

mod outcome;
mod starts;

pub use outcome::Outcome;
pub use starts::{api_key, argv, in_the_clear, prompt, shell};

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use polydev_proto::runtime::{
    Accepted, Artifacts, AttachRequest, AttachStart, CancelRunRequest, CloseStdin, GetRunRequest,
    ListPoolsRequest, ListRunsRequest, ListRunsResponse, Pool, RunEvent, RunInput, RunRequest,
    RunStart, Started, attach_request, run_event::Event, run_input::Input, run_request,
    runtime_service_client::RuntimeServiceClient,
};
use polydev_transport::{
    address::Address,
    tls::{Files, Trust},
};
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, transport::Channel};

use crate::wait_until;

/// Longer than any run of the tests.
const LIMIT: Duration = Duration::from_secs(180);

/// A blocking client, so that tests read from top to bottom.
pub struct Client {
    runtime: Runtime,
    service: RuntimeServiceClient<Channel>,
}

/// A run that has been accepted.
pub struct Run {
    pub accepted: Accepted,
    // Dropped first: that breaks the call. The end of the inputs would only close stdin.
    pub events: Events,
    /// `None` once the caller's side is closed.
    pub inputs: Option<mpsc::Sender<Input>>,
}

/// The events of a run, from any call that sends them.
pub type Events = Pin<Box<dyn Stream<Item = Result<RunEvent, Status>> + Send>>;

impl Run {
    /// Closes the caller's side.
    pub fn close(&mut self) {
        self.inputs = None;
    }
}

impl Client {
    /// # Panics
    /// If no shim answers there.
    #[must_use]
    pub fn connect(address: &str) -> Self {
        Self::try_connect(address).expect("the shim answers")
    }

    /// # Errors
    /// If no shim answers there.
    ///
    /// # Panics
    /// If `address` is not valid.
    pub fn try_connect(address: &str) -> Result<Self, String> {
        Self::open(address, None)
    }

    /// Connects with a certificate.
    ///
    /// # Errors
    /// If no shim answers there, or the shim refuses the certificate.
    ///
    /// # Panics
    /// If `address` is not valid.
    pub fn connect_as(address: &str, files: Files) -> Result<Self, String> {
        Self::open(address, Some(Trust::Mutual(files)))
    }

    fn open(address: &str, trust: Option<Trust>) -> Result<Self, String> {
        let runtime = Runtime::new().expect("a runtime can be made");
        let address: Address = address.parse().expect("the address is valid");
        let connect = address.connect(trust.as_ref(), |endpoint| endpoint);
        let channel = runtime.block_on(connect);
        Ok(Self {
            runtime,
            service: RuntimeServiceClient::new(channel.map_err(|error| error.to_string())?),
        })
    }

    /// Starts a run and waits until it is accepted.
    ///
    /// # Errors
    /// As the shim answers.
    pub fn start(&self, start: RunStart) -> Result<Run, Status> {
        let (inputs, events) = self.submit(start)?;
        self.wait(accepted(inputs, events))
    }

    /// Starts a run and does not wait.
    ///
    /// # Errors
    /// As the shim answers.
    pub fn submit(&self, start: RunStart) -> Result<(mpsc::Sender<Input>, Events), Status> {
        let (inputs, requests) = requests(start);
        let mut service = self.service.clone();
        self.wait(async move {
            let events = service.run(requests).await?.into_inner();
            let events = events.map(|response| Ok(response?.event.expect("an event")));
            Ok((inputs, events.boxed()))
        })
    }

    /// Starts runs at the same moment and waits until all are accepted. The returned time is from
    /// the first request to the last.
    ///
    /// # Errors
    /// The shim's answer to the first run that it refuses.
    pub fn start_all(&self, starts: Vec<RunStart>) -> Result<(Vec<Run>, Duration), Status> {
        let calls = starts.into_iter().map(|start| {
            let (inputs, requests) = requests(start);
            let mut service = self.service.clone();
            async move {
                let sent = Instant::now();
                let events = service.run(requests).await?.into_inner();
                let events = events.map(|response| Ok(response?.event.expect("an event")));
                Ok((accepted(inputs, events.boxed()).await?, sent))
            }
        });
        let started = self.wait(futures_util::future::try_join_all(calls))?;
        let (runs, sent): (Vec<_>, Vec<Instant>) = started.into_iter().unzip();
        let (first, last) = (sent.iter().min(), sent.iter().max());
        let took = first.zip(last).map(|(first, last)| *last - *first);
        Ok((runs, took.unwrap_or_default()))
    }

    /// Attaches to a run of the user `tester`.
    ///
    /// # Errors
    /// As the shim answers.
    pub fn attach(&self, run_id: &str, [stdout, stderr]: [usize; 2]) -> Result<Run, Status> {
        self.attach_as("tester", run_id, [stdout, stderr])
    }

    /// As [`Client::attach`], for another user.
    ///
    /// # Errors
    /// As the shim answers.
    pub fn attach_as(
        &self,
        user_id: &str,
        run_id: &str,
        [stdout, stderr]: [usize; 2],
    ) -> Result<Run, Status> {
        let (inputs, queue) = mpsc::channel(16);
        let first = attach_request::Message::Start(AttachStart {
            run_id: run_id.into(),
            user_id: user_id.into(),
            stdout_offset: stdout as u64,
            stderr_offset: stderr as u64,
            artifact_offset: 0,
            event_offset: 0,
        });
        let rest = ReceiverStream::new(queue)
            .map(|input| attach_request::Message::Input(RunInput { input: Some(input) }));
        let requests = futures_util::stream::iter([first])
            .chain(rest)
            .map(|message| AttachRequest {
                message: Some(message),
            });
        let mut service = self.service.clone();
        self.wait(async move {
            let events = service.attach(requests).await?.into_inner();
            let events = events.map(|response| Ok(response?.event.expect("an event")));
            accepted(inputs, events.boxed()).await
        })
    }

    /// Ends a run of the user `tester`.
    ///
    /// # Errors
    /// As the shim answers.
    pub fn cancel(&self, run_id: &str) -> Result<(), Status> {
        self.cancel_as("tester", run_id)
    }

    /// As [`Client::cancel`], for another user.
    ///
    /// # Errors
    /// As the shim answers.
    pub fn cancel_as(&self, user_id: &str, run_id: &str) -> Result<(), Status> {
        let request = CancelRunRequest {
            run_id: run_id.into(),
            user_id: user_id.into(),
        };
        let mut service = self.service.clone();
        self.wait(async move { service.cancel_run(request).await.map(drop) })
    }

    /// The shim's description of a run of the user `tester`.
    ///
    /// # Errors
    /// As the shim answers.
    ///
    /// # Panics
    /// If the answer has no run.
    pub fn get_run(&self, run_id: &str) -> Result<polydev_proto::runtime::Run, Status> {
        self.get_run_as("tester", run_id)
    }

    /// As [`Client::get_run`], for another user.
    ///
    /// # Errors
    /// As the shim answers.
    ///
    /// # Panics
    /// If the answer has no run.
    pub fn get_run_as(
        &self,
        user_id: &str,
        run_id: &str,
    ) -> Result<polydev_proto::runtime::Run, Status> {
        let request = GetRunRequest {
            run_id: run_id.into(),
            user_id: user_id.into(),
        };
        let mut service = self.service.clone();
        let answer = self.wait(async move { service.get_run(request).await })?;
        Ok(answer.into_inner().run.expect("an answer has a run"))
    }

    /// Any call that is not a stream.
    ///
    /// # Errors
    /// As the shim answers.
    pub fn call<T>(
        &self,
        call: impl AsyncFnOnce(RuntimeServiceClient<Channel>) -> Result<tonic::Response<T>, Status>,
    ) -> Result<T, Status> {
        let answer = self.wait(call(self.service.clone()));
        answer.map(tonic::Response::into_inner)
    }

    /// One page of runs.
    ///
    /// # Errors
    /// As the shim answers.
    pub fn list_runs(&self, request: ListRunsRequest) -> Result<ListRunsResponse, Status> {
        let mut service = self.service.clone();
        let answer = self.wait(async move { service.list_runs(request).await });
        answer.map(tonic::Response::into_inner)
    }

    /// Reads a run to its end, from its first byte.
    ///
    /// # Errors
    /// As the shim answers.
    ///
    /// # Panics
    /// If its output has a gap.
    pub fn finish(&self, run: Run) -> Result<Outcome, Status> {
        self.finish_from(run, [0; 2])
    }

    /// Reads a run to its end, from the offsets of its attach.
    ///
    /// # Errors
    /// As the shim answers.
    ///
    /// # Panics
    /// If its output has a gap.
    pub fn finish_from(&self, run: Run, offsets: [usize; 2]) -> Result<Outcome, Status> {
        let Run {
            accepted,
            inputs: _inputs,
            mut events,
        } = run;
        self.wait(async move {
            let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
            let (mut artifacts, mut artifact_data) = (Artifacts::default(), Vec::new());
            let (mut api_errors, mut denied) = (Vec::new(), Vec::new());
            let mut started = Started::default();
            let (mut agent, mut event_offset) = (Vec::new(), 0);
            let [before_stdout, before_stderr] = offsets.map(|offset| offset as u64);
            loop {
                let event = events.next().await.expect("the last event is `exited`")?;
                match event.event.expect("an event is not empty") {
                    Event::Stdout(output) => {
                        let expected = before_stdout + stdout.len() as u64;
                        assert_eq!(output.offset, expected, "a gap in stdout");
                        stdout.extend_from_slice(&output.data);
                    }
                    Event::Stderr(output) => {
                        let expected = before_stderr + stderr.len() as u64;
                        assert_eq!(output.offset, expected, "a gap in stderr");
                        stderr.extend_from_slice(&output.data);
                    }
                    Event::Artifacts(found) => artifacts = found,
                    Event::ArtifactData(output) => {
                        assert_eq!(output.offset, artifact_data.len() as u64, "a gap");
                        artifact_data.extend_from_slice(&output.data);
                    }
                    Event::Exited(exited) => {
                        assert_eq!(exited.artifact_bytes, artifact_data.len() as u64);
                        let stdout_bytes = before_stdout + stdout.len() as u64;
                        let stderr_bytes = before_stderr + stderr.len() as u64;
                        assert_eq!(exited.stdout_bytes, stdout_bytes);
                        assert_eq!(exited.stderr_bytes, stderr_bytes);
                        assert_eq!(exited.api_errors, api_errors);
                        return Ok(Outcome {
                            accepted,
                            started,
                            agent,
                            stdout,
                            stderr,
                            artifacts,
                            artifact_data,
                            denied,
                            exited,
                        });
                    }
                    Event::Lost(lost) => panic!("output is lost: {lost:?}"),
                    Event::ApiErrors(errors) => api_errors = errors.errors,
                    Event::EgressDenied(destinations) => denied = destinations.destinations,
                    Event::Started(how) => started = how,
                    Event::AgentEvents(told) => {
                        assert!(told.end_offset > event_offset, "told twice");
                        event_offset = told.end_offset;
                        agent.extend(told.events.into_iter().filter_map(|event| event.event));
                    }
                    Event::Accepted(_) | Event::Queued(_) | Event::ApprovalRequired(_) => {}
                }
            }
        })
    }

    /// A whole run without input.
    ///
    /// # Errors
    /// As the shim answers.
    pub fn run(&self, start: RunStart) -> Result<Outcome, Status> {
        self.finish(self.start(start)?)
    }

    /// A whole run with `input` as its stdin.
    ///
    /// # Errors
    /// As the shim answers.
    pub fn run_with_stdin(&self, mut start: RunStart, input: Bytes) -> Result<Outcome, Status> {
        start.stdin = true;
        let run = self.start(start)?;
        let inputs = run.inputs.clone().expect("the side is open");
        let sending = self.runtime.spawn(async move {
            let chunks = (0..input.len()).step_by(64 << 10);
            let chunks = chunks.map(|at| input.slice(at..input.len().min(at + (64 << 10))));
            let messages = chunks
                .map(Input::Stdin)
                .chain([Input::CloseStdin(CloseStdin {})]);
            for message in messages {
                if inputs.send(message).await.is_err() {
                    return;
                }
            }
        });
        let outcome = self.finish(run);
        sending.abort();
        outcome
    }

    /// Sends one message to a run.
    pub fn send(&self, run: &Run, input: Input) {
        let inputs = run.inputs.as_ref().expect("the side is open");
        inputs.try_send(input).expect("the queue has room");
    }

    /// Sends messages to a run, each as soon as the run takes it.
    pub fn send_all(&self, run: &Run, inputs: Vec<Input>) {
        let sender = run.inputs.as_ref().expect("the side is open");
        let send = async {
            for input in inputs {
                sender.send(input).await.expect("the run takes input");
            }
            Ok(())
        };
        self.wait(send).expect("every message is sent");
    }

    /// The next event of a run.
    ///
    /// # Errors
    /// As the shim answers.
    pub fn next(&self, run: &mut Run) -> Result<Option<Event>, Status> {
        self.next_of(&mut run.events)
    }

    /// The next event of a run that may not be accepted yet.
    ///
    /// # Errors
    /// As the shim answers.
    pub fn next_of(&self, events: &mut Events) -> Result<Option<Event>, Status> {
        self.wait(async {
            let event = events.next().await.transpose()?;
            Ok(event.and_then(|event| event.event))
        })
    }

    /// One provider's slots.
    ///
    /// # Panics
    /// If the shim does not answer.
    #[must_use]
    pub fn pool(&self, provider: &str) -> Pool {
        let mut service = self.service.clone();
        let answer = self.wait(async move { service.list_pools(ListPoolsRequest {}).await });
        let pools = answer.expect("the shim lists its pools").into_inner().pools;
        let pool = pools.into_iter().find(|pool| pool.provider == provider);
        pool.expect("every provider has a pool")
    }

    /// Waits until `count` slots of a provider are idle.
    #[track_caller]
    pub fn wait_idle(&self, provider: &str, count: u32) {
        wait_until(
            &format!("{count} idle {provider} slots"),
            Duration::from_secs(90),
            || {
                let pool = self.pool(provider);
                if pool.idle == count {
                    Ok(())
                } else {
                    Err(format!("{pool:?}"))
                }
            },
        );
    }

    fn wait<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        self.runtime.block_on(async {
            tokio::time::timeout(LIMIT, call)
                .await
                .expect("an answer within three minutes")
        })
    }
}

/// What a caller sends: the start, then its input.
fn requests(
    start: RunStart,
) -> (
    mpsc::Sender<Input>,
    impl Stream<Item = RunRequest> + Send + 'static,
) {
    let (inputs, queue) = mpsc::channel(16);
    let first = run_request::Message::Start(Box::new(start));
    let rest = ReceiverStream::new(queue)
        .map(|input| run_request::Message::Input(RunInput { input: Some(input) }));
    let messages = futures_util::stream::iter([first]).chain(rest);
    let requests = messages.map(|message| RunRequest {
        message: Some(message),
    });
    (inputs, requests)
}

/// Waits until a run is accepted. Only `queued` and `approval_required` may come earlier.
async fn accepted(inputs: mpsc::Sender<Input>, mut events: Events) -> Result<Run, Status> {
    loop {
        let event = events.next().await.transpose()?;
        match event.and_then(|event| event.event) {
            Some(Event::Accepted(accepted)) => {
                return Ok(Run {
                    accepted,
                    events,
                    inputs: Some(inputs),
                });
            }
            Some(Event::Queued(_) | Event::ApprovalRequired(_)) => {}
            other => panic!("the first event is {other:?}"),
        }
    }
}
