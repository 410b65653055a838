//! `polydev.node.v1`: decodes, asks the book and the slots, encodes. How slots and events are told is
//! in [`encode`], how they are leased in [`lease`], how runs are closed in [`fence`] and listed in
//! [`runs`], how the node is told of in [`figures`].

mod encode;
mod fence;
mod figures;
mod lease;
mod runs;

use std::{
    collections::HashMap, fs, io, os::unix::fs::PermissionsExt, path::Path, pin::Pin, sync::Arc,
    time::Instant,
};

use futures_util::{Stream, StreamExt, stream};
use polydev_proto::{
    connection::Connection,
    node::{
        AttachRequest, AttachResponse, Attached, CancelRunRequest, CancelRunResponse, Claim,
        ClaimRequest, ClaimResponse, FenceRequest, FenceResponse, GetNodeRequest, GetNodeResponse,
        GetRunRequest, GetRunResponse, LeaseRequest, LeaseResponse, ListRunsRequest,
        ListRunsResponse, ReleaseRequest, ReleaseResponse, RunEvent, RunInput, Slot as SlotMessage,
        WatchRefreshedRequest, WatchRefreshedResponse, WatchRunsRequest, WatchRunsResponse,
        WatchSlotsRequest, WatchSlotsResponse, attach_request, claim_request,
        node_service_server::{NodeService, NodeServiceServer},
        run_event, run_input,
    },
};
use prost_types::Timestamp;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixListener,
    time::Duration,
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::Connected},
};
use wildmatch::WildMatch;

use super::Node;
use crate::run::{
    Input, Run,
    book::NotFound,
    claim::{self, Refusal},
    follow::{BeyondEnd, Follower},
};
use encode::{duration, encode_ended, encode_event, encode_slot};

/// How often a shim is told the time when nothing else happens: claims are dated by
/// this driver's clock, and the shim's own may stand still while the machine sleeps.
const CLOCK: Duration = Duration::from_secs(5);
const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// It is a sentence, and goes into the journal.
const REASON_MOST: usize = 500;
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

/// Of connections from other machines those of shims: whose names `allow` has.
pub fn known(
    incoming: impl Stream<Item = Connection> + Send,
    allow: Vec<String>,
) -> impl Stream<Item = io::Result<Connection>> + Send {
    let allow: Vec<_> = allow.iter().map(|name| WildMatch::new(name)).collect();
    incoming.filter_map(move |connection| {
        let caller = &connection.caller.0;
        let is_known = allow.iter().any(|name| name.matches(caller));
        if !is_known {
            tracing::warn!(caller, "turned away: `shims.allow` does not name it");
        }
        std::future::ready(is_known.then_some(Ok(connection)))
    })
}

/// Serves shims as long as the driver lives.
pub async fn serve<C>(node: Arc<Node>, incoming: impl Stream<Item = io::Result<C>>)
where
    C: Connected + AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = NodeServiceServer::new(Service { node }).max_decoding_message_size(MESSAGE_MOST);
    let served = Server::builder()
        .add_service(service)
        .serve_with_incoming(incoming)
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
    type AttachStream = Responses<AttachResponse>;
    type WatchRunsStream = Responses<WatchRunsResponse>;
    type WatchRefreshedStream = Responses<WatchRefreshedResponse>;

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
                    since: Some(Timestamp::from(node.runs.since())),
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
        let Some(claim_request::Message::Claim(claim)) =
            first(&mut requests).await?.and_then(|first| first.message)
        else {
            return Err(Status::invalid_argument(
                "`claim` must be the first message",
            ));
        };
        let run = self.grant(*claim, arrived)?;
        let mut follower = Follower::new(run.clone(), [0; 3]).map_err(beyond_end)?;
        let stdin_offset = follower.stdin_taken();
        // The first event tells whether it was granted or refused after all.
        let granted = follower.next().await.map(encode_event).transpose()?;
        let inputs = requests.filter_map(|request| async {
            match request.ok()?.message? {
                claim_request::Message::Input(input) => Some(input),
                claim_request::Message::Claim(_) => None,
            }
        });
        self.node.tasks.spawn(forward(inputs.boxed(), run.clone()));
        let first = [Some(attached(&run, stdin_offset)), granted];
        let events = stream::iter(first.into_iter().flatten().map(Ok)).chain(events(follower));
        let responses = events.map(|event| {
            Ok(ClaimResponse {
                event: Some(event?),
            })
        });
        Ok(Response::new(Box::pin(responses)))
    }

    async fn attach(
        &self,
        request: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut requests = request.into_inner();
        let Some(attach_request::Message::Attach(attach)) =
            first(&mut requests).await?.and_then(|first| first.message)
        else {
            return Err(Status::invalid_argument(
                "`attach` must be the first message",
            ));
        };
        let run = self.find(&attach.run_id, Some(&attach.user_id))?;
        // Of a run that has just been taken up it is init that knows how far it is.
        run.known().await;
        let offsets = [
            attach.stdout_offset,
            attach.stderr_offset,
            attach.artifact_offset,
        ];
        let follower = Follower::new(run.clone(), offsets).map_err(beyond_end)?;
        let attached = attached(&run, follower.stdin_taken());
        let inputs = requests.filter_map(|request| async {
            match request.ok()?.message? {
                attach_request::Message::Input(input) => Some(input),
                attach_request::Message::Attach(_) => None,
            }
        });
        self.node.tasks.spawn(forward(inputs.boxed(), run));
        let responses = stream::iter([Ok(attached)]).chain(events(follower));
        let responses = responses.map(|event| {
            Ok(AttachResponse {
                event: Some(event?),
            })
        });
        Ok(Response::new(Box::pin(responses)))
    }

    async fn cancel_run(
        &self,
        request: Request<CancelRunRequest>,
    ) -> Result<Response<CancelRunResponse>, Status> {
        let CancelRunRequest {
            run_id,
            user_id,
            reason,
        } = request.into_inner();
        if reason.len() > REASON_MOST {
            return Err(Status::invalid_argument(format!(
                "`reason` has {} bytes, allowed are {REASON_MOST}",
                reason.len()
            )));
        }
        let user_id = (!user_id.is_empty()).then_some(user_id);
        let run = self.find(&run_id, user_id.as_deref())?;
        self.node.runs.cancel(&run, &reason);
        tracing::info!(run_id, user_id, reason, "cancelled");
        Ok(Response::new(CancelRunResponse {}))
    }

    async fn lease(
        &self,
        request: Request<LeaseRequest>,
    ) -> Result<Response<LeaseResponse>, Status> {
        let leased = lease::lease(&self.node, request.into_inner());
        let leased = leased.map_err(|refusal| refuse(&refusal))?;
        Ok(Response::new(leased))
    }

    async fn release(
        &self,
        request: Request<ReleaseRequest>,
    ) -> Result<Response<ReleaseResponse>, Status> {
        let released = lease::release(&self.node, request.into_inner());
        Ok(Response::new(released.map_err(not_found)?))
    }

    async fn get_node(
        &self,
        _: Request<GetNodeRequest>,
    ) -> Result<Response<GetNodeResponse>, Status> {
        Ok(Response::new(figures::of(&self.node)))
    }

    async fn get_run(
        &self,
        request: Request<GetRunRequest>,
    ) -> Result<Response<GetRunResponse>, Status> {
        let GetRunRequest { run_id, user_id } = request.into_inner();
        let user_id = (!user_id.is_empty()).then_some(user_id);
        let run = self.find(&run_id, user_id.as_deref())?;
        let summary = run.summary().ok_or_else(|| {
            let aborted = NotFound::Aborted { run_id };
            Status::failed_precondition(aborted.to_string())
        })?;
        Ok(Response::new(GetRunResponse {
            run: Some(runs::encode(summary)),
        }))
    }

    async fn list_runs(
        &self,
        request: Request<ListRunsRequest>,
    ) -> Result<Response<ListRunsResponse>, Status> {
        let (filter, limit) = runs::decode(request.into_inner())?;
        let runs = self.node.runs.list(&filter, limit);
        Ok(Response::new(ListRunsResponse {
            runs: runs.into_iter().map(runs::encode).collect(),
        }))
    }

    async fn watch_runs(
        &self,
        request: Request<WatchRunsRequest>,
    ) -> Result<Response<Self::WatchRunsStream>, Status> {
        let told = runs::watch(self.node.clone(), request.into_inner());
        Ok(Response::new(told.map(Ok).boxed()))
    }

    async fn watch_refreshed(
        &self,
        _: Request<WatchRefreshedRequest>,
    ) -> Result<Response<Self::WatchRefreshedStream>, Status> {
        let told = runs::watch_refreshed(self.node.clone());
        Ok(Response::new(told.map(Ok).boxed()))
    }

    async fn fence(
        &self,
        request: Request<FenceRequest>,
    ) -> Result<Response<FenceResponse>, Status> {
        fence::fence(&self.node, request.into_inner()).map(Response::new)
    }
}

impl Service {
    fn grant(&self, claim: Claim, arrived: Instant) -> Result<Arc<Run>, Status> {
        let node = &self.node;
        let (slot_id, generation) = (claim.slot_id.clone(), claim.generation);
        let (start_id, start_by) = (claim.start_id.clone(), claim.start_by);
        tracing::debug!(
            run_id = claim.run_id,
            user_id = claim.user_id,
            slot_id,
            "claim"
        );
        let decide = || {
            let parsed = claim::parse(claim)?;
            // A claim that is repeated has its answer, whatever has changed meanwhile.
            if let Some(run) = node.runs.repeated(&parsed)? {
                return Ok(run);
            }
            if start_id != node.start_id {
                let actual = node.start_id.clone();
                return Err(Refusal::OtherStart {
                    given: start_id,
                    actual,
                });
            }
            let left = time_left(start_by).ok_or(Refusal::TooLate)?;
            let slot = node.slots.by_slot_id(&slot_id);
            let slot = slot.ok_or(Refusal::UnknownSlot { slot_id })?;
            slot.claim(node, generation, parsed, arrived, arrived + left)
        };
        decide().map_err(|refusal| refuse(&refusal))
    }

    /// `None` is the operator.
    fn find(&self, run_id: &str, user_id: Option<&str>) -> Result<Arc<Run>, Status> {
        self.node.runs.find(run_id, user_id).map_err(not_found)
    }
}

fn not_found(error: NotFound) -> Status {
    let message = error.to_string();
    match error {
        NotFound::Forbidden { .. } => Status::permission_denied(message),
        NotFound::Aborted { .. } => Status::failed_precondition(message),
        NotFound::Unknown { .. } | NotFound::Released { .. } => Status::not_found(message),
    }
}

/// A shim says what it wants at once, or it is none.
async fn first<T>(requests: &mut Streaming<T>) -> Result<Option<T>, Status> {
    let first = tokio::time::timeout(FIRST_MESSAGE, requests.message()).await;
    first.map_err(|_| Status::deadline_exceeded("no first message came in 10 s"))?
}

/// The first event of every call.
fn attached(run: &Run, stdin_offset: u64) -> RunEvent {
    let attached = Attached {
        slot_id: run.claimed.slot_id.clone(),
        generation: run.claimed.generation,
        stdin_offset,
        on_demand: run.claimed.on_demand,
        files_bytes: run.claimed.files_bytes,
    };
    RunEvent {
        event: Some(run_event::Event::Attached(attached)),
    }
}

/// What a caller of a run is told, as it asks for it.
fn events(follower: Follower) -> impl Stream<Item = Result<RunEvent, Status>> + Send {
    stream::unfold(follower, |mut follower| async move {
        let event = follower.next().await?;
        Some((encode_event(event), follower))
    })
}

/// Until the caller closes its side or goes away, or the run ends. That a caller is gone
/// closes nothing: it may come back.
async fn forward(mut inputs: stream::BoxStream<'static, RunInput>, run: Arc<Run>) {
    loop {
        let input = tokio::select! {
            input = inputs.next() => input,
            () = run.over() => return,
        };
        let input = match input.map(|input| input.input) {
            Some(Some(run_input::Input::Stdin(stdin))) => Input::Stdin {
                offset: stdin.offset,
                data: stdin.data,
            },
            Some(Some(run_input::Input::CloseStdin(_))) => Input::CloseStdin,
            Some(Some(run_input::Input::Signal(signal))) => Input::Signal(signal.number),
            Some(Some(run_input::Input::Resize(size))) => Input::Resize(size),
            // A message of a newer shim.
            Some(None) => continue,
            None => return,
        };
        if !run.input(input).await {
            return;
        }
    }
}

/// From now, by this driver's clock; `None` once it has passed or if it is missing.
fn time_left(until: Option<Timestamp>) -> Option<Duration> {
    let until = std::time::SystemTime::try_from(until?).ok()?;
    until.duration_since(std::time::SystemTime::now()).ok()
}

enum Told {
    Nothing,
    Something,
}

fn beyond_end(error: BeyondEnd) -> Status {
    Status::out_of_range(error.to_string())
}

/// All refusals are definite; see `node.proto` for what a shim does after each.
fn refuse(refusal: &Refusal) -> Status {
    let message = crate::chain(refusal);
    match refusal {
        Refusal::Fenced { .. } => Status::aborted(message),
        Refusal::TooLate
        | Refusal::OtherStart { .. }
        | Refusal::Taken(_)
        | Refusal::UnknownSlot { .. }
        | Refusal::Broken { .. }
        | Refusal::NotReached => Status::failed_precondition(message),
        Refusal::Full(_) | Refusal::NoOutput { .. } | Refusal::Journal(_) => {
            Status::resource_exhausted(message)
        }
        Refusal::OtherCommand { .. } | Refusal::Released { .. } => Status::already_exists(message),
        Refusal::Invalid(_) => Status::invalid_argument(message),
    }
}
