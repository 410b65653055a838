//! `polydev.node.v1`: decodes, asks the book and the slots, encodes.

use std::{
    collections::HashMap, fs, io, os::unix::fs::PermissionsExt, path::Path, pin::Pin, sync::Arc,
    time::Instant,
};

use futures_util::{Stream, StreamExt};
use polydev_proto::node::{
    Claim, ClaimRequest, ClaimResponse, Ended, Granted, Output, Slot as SlotMessage, Started,
    WatchSlotsRequest, WatchSlotsResponse, claim_request, claim_response,
    node_service_server::{NodeService, NodeServiceServer},
    slot,
};
use prost_types::Timestamp;
use tokio::{net::UnixListener, sync::mpsc, time::Duration};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::Node;
use crate::slot::{
    Slot,
    claim::{self, EVENTS, Event, INPUTS, Input, Refusal},
    state::State,
};

/// How often a shim is told the time when nothing else happens: claims are dated by
/// this driver's clock, and the shim's own may stand still while the machine sleeps.
const CLOCK: Duration = Duration::from_secs(5);
/// A shim says what it claims at once, or it is none.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// A claim with argv and environment at the kernel's limits, and credential files.
const MESSAGE_MOST: usize = 4 << 20;

/// Binds the node service's socket, for root alone.
///
/// # Errors
/// As the kernel says.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves shims as long as the driver lives.
pub async fn serve(node: Arc<Node>, listener: UnixListener) {
    let service = NodeServiceServer::new(Service { node }).max_decoding_message_size(MESSAGE_MOST);
    let served = Server::builder()
        .add_service(service)
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await;
    if let Err(error) = served {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "the node service ended"
        );
    }
}

struct Service {
    node: Arc<Node>,
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl NodeService for Service {
    type WatchSlotsStream = Responses<WatchSlotsResponse>;
    type ClaimStream = Responses<ClaimResponse>;

    async fn watch_slots(
        &self,
        _: Request<WatchSlotsRequest>,
    ) -> Result<Response<Self::WatchSlotsStream>, Status> {
        let node = self.node.clone();
        let changes = node.slots.changes().subscribe();
        // What this shim was told, to tell it only what differs.
        let told: HashMap<String, SlotMessage> = HashMap::new();
        let state = (node, changes, told, Told::Nothing);
        let updates =
            futures_util::stream::unfold(state, |(node, mut changes, told, first)| async move {
                if let Told::Something = first {
                    let changed = tokio::time::timeout(CLOCK, changes.changed()).await;
                    if let Ok(Err(_)) = changed {
                        return None;
                    }
                }
                changes.mark_unchanged();
                let now: HashMap<String, SlotMessage> = node
                    .slots
                    .all()
                    .iter()
                    .filter(|slot| slot.end().is_none())
                    .map(|slot| (slot.identity.slot_id(), encode_slot(slot)))
                    .collect();
                let response = WatchSlotsResponse {
                    start_id: node.start_id.clone(),
                    now: Some(Timestamp::from(std::time::SystemTime::now())),
                    snapshot: matches!(first, Told::Nothing),
                    slots: now
                        .values()
                        .filter(|slot| told.get(&slot.slot_id) != Some(slot))
                        .cloned()
                        .collect(),
                    removed: told
                        .into_keys()
                        .filter(|id| !now.contains_key(id))
                        .collect(),
                };
                Some((Ok(response), (node, changes, now, Told::Something)))
            });
        Ok(Response::new(Box::pin(updates)))
    }

    async fn claim(
        &self,
        request: Request<Streaming<ClaimRequest>>,
    ) -> Result<Response<Self::ClaimStream>, Status> {
        let arrived = Instant::now();
        let mut requests = request.into_inner();
        let first = tokio::time::timeout(FIRST_MESSAGE, requests.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no claim came"))??;
        let Some(ClaimRequest {
            message: Some(claim_request::Message::Claim(claim)),
        }) = first
        else {
            return Err(Status::invalid_argument(
                "`claim` must be the first message",
            ));
        };
        let mut responses = self.grant(*claim, arrived, requests)?;
        // The first event says whether it was granted; a refusal is the call's status.
        let first = match responses.recv().await {
            Some(Ok(event)) => encode_event(event),
            Some(Err(refusal)) => return Err(refusal.into()),
            None => return Err(Status::unknown("the slot ended")),
        };
        let rest = ReceiverStream::new(responses)
            .map(|event| event.map(encode_event).map_err(Status::from));
        Ok(Response::new(Box::pin(
            futures_util::stream::iter([Ok(first)]).chain(rest),
        )))
    }
}

impl Service {
    fn grant(
        &self,
        claim: Claim,
        arrived: Instant,
        requests: Streaming<ClaimRequest>,
    ) -> Result<mpsc::Receiver<Result<Event, Refusal>>, Refusal> {
        let node = &self.node;
        if claim.start_id != node.start_id {
            let actual = node.start_id.clone();
            return Err(Refusal::OtherStart {
                given: claim.start_id,
                actual,
            });
        }
        let start_by = time_left(claim.start_by).ok_or(Refusal::TooLate)?;
        let slot = node.slots.by_slot_id(&claim.slot_id);
        let slot = slot.ok_or_else(|| Refusal::UnknownSlot {
            slot_id: claim.slot_id.clone(),
        })?;
        let generation = claim.generation;
        tracing::debug!(
            run_id = claim.run_id,
            user_id = claim.user_id,
            slot_id = claim.slot_id,
            "claim"
        );
        let parsed = claim::parse(claim)?;

        let (events, responses) = mpsc::channel(EVENTS);
        let (inputs, input_queue) = mpsc::channel(INPUTS);
        slot.claim(
            node,
            generation,
            claim::Claim {
                run_id: parsed.start.run_id.clone(),
                arrived,
                start_by: arrived + start_by,
                start: parsed.start,
                timeout: parsed.timeout,
                kill_timeout: parsed.kill_timeout,
                events,
                inputs: input_queue,
            },
        )?;
        node.tasks.spawn(forward_inputs(requests, inputs));
        Ok(responses)
    }
}

/// Until the caller closes its side or goes away, or the run ends.
async fn forward_inputs(mut requests: Streaming<ClaimRequest>, inputs: mpsc::Sender<Input>) {
    loop {
        let request = tokio::select! {
            request = requests.message() => request,
            () = inputs.closed() => return,
        };
        let Ok(Some(ClaimRequest { message })) = request else {
            return;
        };
        let input = match message {
            Some(claim_request::Message::Stdin(data)) => Input::Stdin(data),
            Some(claim_request::Message::CloseStdin(_)) => Input::CloseStdin,
            Some(claim_request::Message::Signal(signal)) => Input::Signal(signal.number),
            // A second claim on the same call, or a message of a newer shim.
            Some(claim_request::Message::Claim(_)) | None => return,
        };
        if inputs.send(input).await.is_err() {
            return;
        }
    }
}

/// From now, by this driver's clock; `None` once it has passed or if it is missing.
fn time_left(until: Option<Timestamp>) -> Option<Duration> {
    let until = std::time::SystemTime::try_from(until?).ok()?;
    until.duration_since(std::time::SystemTime::now()).ok()
}

fn encode_slot(slot: &Slot) -> SlotMessage {
    let life = slot.life();
    let (state, run_id) = match life.state() {
        State::Warming => (slot::State::Warming, None),
        State::Idle => (slot::State::Idle, None),
        State::Claimed { run_id } => (slot::State::Claimed, Some(run_id)),
        State::Recycling => (slot::State::Recycling, None),
        State::Draining { run_id } => (slot::State::Draining, run_id.as_ref()),
        State::Failed => (slot::State::Failed, None),
    };
    SlotMessage {
        slot_id: slot.identity.slot_id(),
        provider: slot.config.provider.clone(),
        image: slot.config.image.clone(),
        state: state.into(),
        generation: life.generation(),
        reason: life.reason().to_owned(),
        since: Some(Timestamp::from(life.since())),
        namespace: slot.identity.namespace.clone(),
        job_id: slot.identity.job_id.clone(),
        alloc_id: slot.identity.alloc_id.clone(),
        run_id: run_id.cloned().unwrap_or_default(),
    }
}

fn encode_event(event: Event) -> ClaimResponse {
    use polydev_proto::init::Stream as Kind;
    let event = match event {
        Event::Granted {
            granted_after,
            limits_raised_after,
        } => claim_response::Event::Granted(Granted {
            granted_after: duration(granted_after),
            limits_raised_after: duration(limits_raised_after),
        }),
        Event::Started { after } => claim_response::Event::Started(Started {
            after: duration(after),
        }),
        Event::Output {
            stream: Kind::Stderr,
            offset,
            data,
        } => claim_response::Event::Stderr(Output { offset, data }),
        Event::Output {
            stream: Kind::Stdout | Kind::Unspecified,
            offset,
            data,
        } => claim_response::Event::Stdout(Output { offset, data }),
        Event::Ended(ended) => claim_response::Event::Ended(Ended {
            reason: ended.reason.into(),
            exit_code: ended.exit_code,
            signal: ended.signal,
            message: ended.message,
            after: duration(ended.after),
            first_output_after: ended.first_output_after.and_then(duration),
            stdout_bytes: ended.stdout_bytes,
            stderr_bytes: ended.stderr_bytes,
        }),
    };
    ClaimResponse { event: Some(event) }
}

/// A run's times are far within what a protobuf duration holds.
fn duration(duration: Duration) -> Option<prost_types::Duration> {
    duration.try_into().ok()
}

enum Told {
    Nothing,
    Something,
}

/// All refusals are definite; see `node.proto` for what a shim does after each.
impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::TooLate | Refusal::OtherStart { .. } => Self::aborted(message),
            Refusal::Taken(_) | Refusal::UnknownSlot { .. } | Refusal::Broken { .. } => {
                Self::failed_precondition(message)
            }
            Refusal::Full(_) => Self::resource_exhausted(message),
            Refusal::Invalid(_) => Self::invalid_argument(message),
        }
    }
}
