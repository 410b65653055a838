//! One run with a caller that does not give up. The caller continues a broken stream through
//! another shim. Before it retries a run that may have run, it asks for the run.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures_util::{Stream, StreamExt};
use polydev_proto::runtime::{
    AttachRequest, AttachStart, ExitReason, Exited, Output, RunEvent, RunRequest, attach_request,
    run_event::Event, run_request, runtime_service_client::RuntimeServiceClient, started,
};
use rand::{Rng, rngs::StdRng};
use sha2::{Digest, Sha256};
use tokio::time::{sleep, timeout};
use tonic::{
    Code, Response, Status, Streaming,
    transport::{Channel, Endpoint},
};

use crate::spec::Spec;

/// Longer than every step that is not broken for good.
const LIMIT: Duration = Duration::from_secs(180);
const CONNECT: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(200);
pub(crate) const USER: &str = "chaos";

/// The running shims; clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Addresses(pub(crate) Arc<Mutex<Vec<String>>>);

impl Addresses {
    /// One of the shims. Another number gives another shim.
    pub(crate) fn any(&self, number: usize) -> String {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all[number % all.len()].clone()
    }
}

/// A run, and what its caller received.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) spec: Spec,
    pub(crate) outcome: Outcome,
    pub(crate) attempts: u32,
    pub(crate) attached: u32,
    pub(crate) on_demand: bool,
    /// Whether the CLI was waiting.
    pub(crate) parked: bool,
    /// The length and the hash of each received stream.
    pub(crate) received: [(u64, [u8; 32]); 2],
    /// How often bytes came twice or in the wrong order.
    pub(crate) gaps: u32,
}

#[derive(Debug)]
pub(crate) enum Outcome {
    /// The run ended by itself.
    Whole(Exited),
    /// The run ended in another way, with this reason.
    Lost(Exited),
    /// The run did not run.
    Refused(Status),
    /// The run may have run.
    Told(Status),
    /// The caller got no answer in time.
    Stuck(String),
}

impl Outcome {
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Whole(_) => "whole",
            Self::Lost(_) => "lost",
            Self::Refused(_) => "refused",
            Self::Told(_) => "told",
            Self::Stuck(_) => "stuck",
        }
    }

    /// What the caller was told.
    pub(crate) fn words(&self) -> String {
        match self {
            Self::Whole(exited) | Self::Lost(exited) => format!("{exited:?}"),
            Self::Refused(status) | Self::Told(status) => format!("{status:?}"),
            Self::Stuck(last) => last.clone(),
        }
    }
}

/// What has arrived.
#[derive(Default)]
struct Received {
    accepted: bool,
    on_demand: bool,
    parked: bool,
    offsets: [u64; 2],
    hashes: [Sha256; 2],
    gaps: u32,
}

/// How one stream ended.
enum Stop {
    Exited(Exited),
    /// The caller went away.
    Left,
    Status(Status),
}

/// Runs `spec` to an outcome.
pub(crate) async fn call(shims: &Addresses, spec: Spec, rng: &mut StdRng) -> Call {
    let mut received = Received::default();
    let (mut attempts, mut attached, mut turn) = (0, 0, rng.random_range(0..2));
    let mut leaves_at = spec.leaves_at;
    let mut last = String::new();
    let begun = Instant::now();
    let outcome = loop {
        if begun.elapsed() > LIMIT {
            break Outcome::Stuck(last);
        }
        turn += 1;
        let address = shims.any(turn);
        let stop = if received.accepted {
            attached += 1;
            attach(&address, &spec, &mut received, &mut leaves_at).await
        } else {
            attempts += 1;
            run(&address, &spec, attempts, &mut received, &mut leaves_at).await
        };
        let status = match stop {
            Stop::Exited(exited) if exited.reason() == ExitReason::Exited => {
                break Outcome::Whole(exited);
            }
            Stop::Exited(exited) => break Outcome::Lost(exited),
            Stop::Left => continue,
            Stop::Status(status) => status,
        };
        last = format!("{status:?}");
        match (status.code(), received.accepted) {
            (Code::ResourceExhausted, false) => break Outcome::Refused(status),
            // The run was claimed and not started, so the caller may retry it.
            (Code::FailedPrecondition, true) => received.accepted = false,
            (Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded, _) => {}
            _ => break Outcome::Told(status),
        }
        sleep(AGAIN.mul_f64(rng.random_range(0.5..1.5))).await;
    };
    let Received {
        on_demand,
        parked,
        offsets,
        hashes,
        gaps,
        ..
    } = received;
    let [stdout, stderr] = hashes.map(|hash| hash.finalize().into());
    Call {
        spec,
        outcome,
        attempts,
        attached,
        on_demand,
        parked,
        received: [(offsets[0], stdout), (offsets[1], stderr)],
        gaps,
    }
}

async fn run(
    address: &str,
    spec: &Spec,
    attempt: u32,
    received: &mut Received,
    leaves_at: &mut Option<u64>,
) -> Stop {
    let first = RunRequest {
        message: Some(run_request::Message::Start(Box::new(spec.start(attempt)))),
    };
    let mut service = match connect(address).await {
        Ok(service) => service,
        Err(status) => return Stop::Status(status),
    };
    let events = service.run(open(first)).await;
    follow(events, |response| response.event, received, leaves_at).await
}

async fn attach(
    address: &str,
    spec: &Spec,
    received: &mut Received,
    leaves_at: &mut Option<u64>,
) -> Stop {
    let [stdout_offset, stderr_offset] = received.offsets;
    let first = AttachRequest {
        message: Some(attach_request::Message::Start(AttachStart {
            run_id: spec.run_id.clone(),
            user_id: USER.into(),
            stdout_offset,
            stderr_offset,
            artifact_offset: 0,
            event_offset: 0,
        })),
    };
    let mut service = match connect(address).await {
        Ok(service) => service,
        Err(status) => return Stop::Status(status),
    };
    let events = service.attach(open(first)).await;
    follow(events, |response| response.event, received, leaves_at).await
}

/// The caller sends one message, and stays connected.
fn open<T: Send + 'static>(first: T) -> impl Stream<Item = T> + Send + 'static {
    futures_util::stream::iter([first]).chain(futures_util::stream::pending())
}

async fn connect(address: &str) -> Result<RuntimeServiceClient<Channel>, Status> {
    let endpoint = Endpoint::from_shared(address.to_owned());
    let endpoint = endpoint.map_err(|error| Status::internal(error.to_string()))?;
    let connected = timeout(CONNECT, endpoint.connect()).await;
    let channel = connected
        .map_err(|_| Status::unavailable("no connection"))?
        .map_err(|error| Status::unavailable(error.to_string()))?;
    Ok(RuntimeServiceClient::new(channel))
}

async fn follow<T>(
    events: Result<Response<Streaming<T>>, Status>,
    event_of: impl Fn(T) -> Option<RunEvent>,
    received: &mut Received,
    leaves_at: &mut Option<u64>,
) -> Stop {
    let mut events = match events {
        Ok(events) => events.into_inner(),
        Err(status) => return Stop::Status(status),
    };
    loop {
        let event = match timeout(LIMIT, events.message()).await {
            Ok(Ok(Some(response))) => event_of(response).and_then(|event| event.event),
            Ok(Ok(None)) => return Stop::Status(Status::unavailable("the stream ended")),
            Ok(Err(status)) => return Stop::Status(status),
            Err(_) => return Stop::Status(Status::deadline_exceeded("silence")),
        };
        match event {
            Some(Event::Accepted(accepted)) => {
                received.accepted = true;
                received.on_demand |= !accepted.warm;
            }
            Some(Event::Stdout(output)) => received.take(0, &output),
            Some(Event::Stderr(output)) => received.take(1, &output),
            Some(Event::Lost(_)) => received.gaps += 1,
            Some(Event::Exited(exited)) => return Stop::Exited(exited),
            Some(Event::Started(started)) => {
                received.parked = started.agent() == started::Agent::Parked;
            }
            // The run requests no artifacts and has no policy.
            Some(
                Event::Queued(_)
                | Event::ApprovalRequired(_)
                | Event::Artifacts(_)
                | Event::ArtifactData(_)
                | Event::ApiErrors(_)
                | Event::EgressDenied(_)
                | Event::AgentEvents(_),
            )
            | None => {}
        }
        if received.accepted && leaves_at.is_some_and(|bytes| received.offsets[0] >= bytes) {
            *leaves_at = None;
            return Stop::Left;
        }
    }
}

impl Received {
    fn take(&mut self, stream: usize, output: &Output) {
        let offset = &mut self.offsets[stream];
        if output.offset != *offset {
            self.gaps += 1;
        }
        *offset = output.offset + output.data.len() as u64;
        self.hashes[stream].update(&output.data);
    }
}
