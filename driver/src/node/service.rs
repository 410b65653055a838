//! `polydev.node.v1`: decodes, asks the book and the slots, encodes. [`slots`] is what a
//! shim watches, [`claim`] and [`lease`] decode its requests, [`call`] is a run's stream in
//! both directions and [`encode`] its events, [`tools`] are calls of their tools, [`fence`] closes runs, [`runs`] lists them
//! and sends their accounts, [`figures`] sums up the node, and [`images`] are its own.

mod call;
mod claim;
mod encode;
mod fence;
mod figures;
mod images;
mod lease;
mod runs;
mod slots;
mod tools;

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    pin::Pin,
    sync::Arc,
    time::Instant,
};

use futures_util::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use nix::unistd::Gid;
use polydev_proto::{
    id::{RunId, UserId},
    node::{
        AnswerToolCallRequest, AnswerToolCallResponse, AttachRequest, AttachResponse,
        CancelRunRequest, CancelRunResponse, ClaimRequest, ClaimResponse, FenceRequest,
        FenceResponse, GetNodeRequest, GetNodeResponse, GetRunRequest, GetRunResponse,
        LeaseRequest, LeaseResponse, ListImagesRequest, ListImagesResponse, ListRunsRequest,
        ListRunsResponse, PruneImagesRequest, PruneImagesResponse, ReleaseRequest, ReleaseResponse,
        RunEvent, RunInput, WatchRefreshedRequest, WatchRefreshedResponse, WatchRunsRequest,
        WatchRunsResponse, WatchSlotsRequest, WatchSlotsResponse, WatchToolCallsRequest,
        WatchToolCallsResponse, attach_request, claim_request,
        node_service_server::{NodeService, NodeServiceServer},
    },
    stream::PerStream,
};
use polydev_transport::{connection::Connection, names::Pattern};
use prost_types::Timestamp;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixListener,
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::Connected},
};

use super::Node;
use crate::run::{
    Run,
    book::NotFound,
    cancel::Cause,
    claim::Refusal,
    follow::{BeyondEnd, Follower},
};
use encode::{duration, encode_ended, encode_event, encode_slot};

/// A reason is a sentence, and the journal stores it.
const MAX_REASON: usize = 500;
/// Fits a claim with credential files, and with argv and environment at the kernel's
/// limits.
const MAX_MESSAGE: usize = 4 << 20;

/// Binds the node service's socket, for root and the members of a group.
///
/// # Errors
/// The kernel's error.
pub fn listen(path: &Path, group: Option<Gid>) -> io::Result<UnixListener> {
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    let gid = group.map(Gid::as_raw);
    if let (Some(folder), Some(_)) = (path.parent(), group) {
        fs::create_dir_all(folder)?;
        mode(folder, 0o750)?;
        chown(folder, None, gid)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    chown(path, None, gid)?;
    mode(path, if group.is_some() { 0o660 } else { 0o600 })?;
    Ok(listener)
}

/// Only connections of shims whose names are in `allow`.
pub fn known(
    incoming: impl Stream<Item = Connection> + Send,
    allow: Vec<Pattern>,
) -> impl Stream<Item = io::Result<Connection>> + Send {
    incoming.filter_map(move |connection| {
        let caller = &connection.known.caller.0;
        let is_known = allow.iter().any(|name| name.matches(caller));
        if !is_known {
            tracing::warn!(
                caller,
                "rejected a connection: `shims.allow` does not contain the caller's name"
            );
        }
        std::future::ready(is_known.then_some(Ok(connection)))
    })
}

/// Serves shims as long as the driver lives.
pub async fn serve<C>(node: Arc<Node>, incoming: impl Stream<Item = io::Result<C>>)
where
    C: Connected + AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = NodeServiceServer::new(Service { node }).max_decoding_message_size(MAX_MESSAGE);
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
    type WatchToolCallsStream = Responses<WatchToolCallsResponse>;

    async fn watch_slots(
        &self,
        _: Request<WatchSlotsRequest>,
    ) -> Result<Response<Self::WatchSlotsStream>, Status> {
        let changes = slots::watch(self.node.slots.clone());
        Ok(Response::new(changes.map(Ok).boxed()))
    }

    async fn claim(
        &self,
        request: Request<Streaming<ClaimRequest>>,
    ) -> Result<Response<Self::ClaimStream>, Status> {
        let arrived = Instant::now();
        let mut requests = request.into_inner();
        let first = call::first(&mut requests).await?;
        let Some(claim_request::Message::Claim(claim)) = first.and_then(|first| first.message)
        else {
            return Err(Status::invalid_argument(
                "`claim` must be the first message",
            ));
        };
        let decoded = claim::decode(*claim, &self.node.site.permits);
        let (target, parsed) = decoded.map_err(|refusal| refuse(&refusal))?;
        let span = tracing::info_span!("claim", slot_id = %target.slot_id);
        let run = span.in_scope(|| self.node.slots.claim(target, parsed, arrived));
        let run = run.map_err(|refusal| refuse(&refusal))?;

        let mut follower = Follower::new(run.clone(), PerStream::default()).map_err(beyond_end)?;
        // The first event shows whether the claim was granted or refused.
        let granted = follower.next().await.map(encode_event).transpose()?;
        let inputs = requests.filter_map(|request| async {
            match request.ok()?.message? {
                claim_request::Message::Input(input) => Some(input),
                claim_request::Message::Claim(_) => None,
            }
        });
        let events = self.converse(run, follower, granted, inputs.boxed());
        let responses = events.map(|event| {
            let event = Some(event?);
            Ok(ClaimResponse { event })
        });
        Ok(Response::new(responses.boxed()))
    }

    async fn attach(
        &self,
        request: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut requests = request.into_inner();
        let first = call::first(&mut requests).await?;
        let Some(attach_request::Message::Attach(attach)) = first.and_then(|first| first.message)
        else {
            return Err(Status::invalid_argument(
                "`attach` must be the first message",
            ));
        };
        let user_id = UserId::from(attach.user_id);
        let run = self.find(&attach.run_id, Some(&user_id))?;
        // Only init knows the progress of a run that was just recovered.
        run.known().await;
        let offsets = PerStream::new(
            attach.stdout_offset,
            attach.stderr_offset,
            attach.artifact_offset,
            attach.event_offset,
        );
        let follower = Follower::new(run.clone(), offsets).map_err(beyond_end)?;
        let inputs = requests.filter_map(|request| async {
            match request.ok()?.message? {
                attach_request::Message::Input(input) => Some(input),
                attach_request::Message::Attach(_) => None,
            }
        });
        let events = self.converse(run, follower, None, inputs.boxed());
        let responses = events.map(|event| {
            let event = Some(event?);
            Ok(AttachResponse { event })
        });
        Ok(Response::new(responses.boxed()))
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
        if reason.len() > MAX_REASON {
            return Err(Status::invalid_argument(format!(
                "`reason` has {} bytes; at most {MAX_REASON} are allowed",
                reason.len()
            )));
        }
        let user_id = given(user_id).map(UserId::from);
        let run = self.find(&run_id, user_id.as_ref())?;
        self.node.runs.cancel(&run, Cause::Asked(reason.clone()));
        let user_id = user_id.as_ref().map(UserId::as_str);
        tracing::info!(run_id, user_id, reason, "cancelled");
        Ok(Response::new(CancelRunResponse {}))
    }

    async fn lease(
        &self,
        request: Request<LeaseRequest>,
    ) -> Result<Response<LeaseResponse>, Status> {
        let wanted = lease::decode(request.into_inner()).map_err(|invalid| refuse(&invalid))?;
        let until = self.node.slots.lease(&wanted);
        let until = until.map_err(|refusal| refuse(&refusal))?;
        let expires_at = Some(Timestamp::from(until));
        Ok(Response::new(LeaseResponse { expires_at }))
    }

    async fn release(
        &self,
        request: Request<ReleaseRequest>,
    ) -> Result<Response<ReleaseResponse>, Status> {
        let ReleaseRequest { run_id, user_id } = request.into_inner();
        let run_id = parse_id(&run_id)?;
        let released = self.node.slots.release(run_id, &user_id.into());
        released.map_err(not_found)?;
        Ok(Response::new(ReleaseResponse {}))
    }

    async fn get_node(
        &self,
        _: Request<GetNodeRequest>,
    ) -> Result<Response<GetNodeResponse>, Status> {
        Ok(Response::new(figures::of(&self.node)))
    }

    async fn list_images(
        &self,
        _: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let ours = self.node.site.images.ours().await;
        Ok(Response::new(images::list(ours)?))
    }

    async fn prune_images(
        &self,
        request: Request<PruneImagesRequest>,
    ) -> Result<Response<PruneImagesResponse>, Status> {
        let PruneImagesRequest { all, remove } = request.into_inner();
        let images = self.node.site.images.clone();
        // It goes on if the caller does not wait.
        let pruned = tokio::spawn(async move { images.prune(all, remove).await });
        let pruned = pruned
            .await
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(images::pruned(pruned)?))
    }

    async fn get_run(
        &self,
        request: Request<GetRunRequest>,
    ) -> Result<Response<GetRunResponse>, Status> {
        let GetRunRequest { run_id, user_id } = request.into_inner();
        let user_id = given(user_id).map(UserId::from);
        let run = self.find(&run_id, user_id.as_ref())?;
        let run_id = run.claimed.run_id;
        let summary = run.summary().ok_or_else(|| {
            let aborted = NotFound::Aborted { run_id };
            Status::failed_precondition(aborted.to_string())
        })?;
        Ok(Response::new(GetRunResponse {
            run: Some(runs::encode_whole(summary)),
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

    async fn watch_tool_calls(
        &self,
        request: Request<WatchToolCallsRequest>,
    ) -> Result<Response<Self::WatchToolCallsStream>, Status> {
        let WatchToolCallsRequest { ends } = request.into_inner();
        let told = tools::watch(self.node.clone(), ends);
        Ok(Response::new(told.map(Ok).boxed()))
    }

    async fn answer_tool_call(
        &self,
        request: Request<AnswerToolCallRequest>,
    ) -> Result<Response<AnswerToolCallResponse>, Status> {
        let AnswerToolCallRequest { run_id, answer } = request.into_inner();
        let run = self.find(&run_id, None)?;
        tools::answer(&self.node, &run, answer)?;
        Ok(Response::new(AnswerToolCallResponse {}))
    }

    async fn fence(
        &self,
        request: Request<FenceRequest>,
    ) -> Result<Response<FenceResponse>, Status> {
        fence::fence(&self.node, request.into_inner()).map(Response::new)
    }
}

impl Service {
    /// Forwards a caller's input to its run, and returns the run's events. `first` is what was
    /// already taken from the follower.
    fn converse(
        &self,
        run: Arc<Run>,
        follower: Follower,
        first: Option<RunEvent>,
        inputs: BoxStream<'static, RunInput>,
    ) -> impl Stream<Item = Result<RunEvent, Status>> + Send + use<> {
        let attached = call::attached(&run, follower.stdin_taken());
        let background = &self.node.site.background;
        background.spawn(call::forward(inputs, run));
        let first = [Some(attached), first].into_iter().flatten().map(Ok);
        stream::iter(first).chain(call::events(follower))
    }

    /// `None` stands for the operator.
    fn find(&self, run_id: &str, user_id: Option<&UserId>) -> Result<Arc<Run>, Status> {
        let found = self.node.runs.find(parse_id(run_id)?, user_id);
        found.map_err(not_found)
    }
}

/// A field that may be left out.
fn given(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn parse_id(run_id: &str) -> Result<RunId, Status> {
    let parsed = crate::run::claim::run_id(run_id);
    parsed.map_err(|invalid| Status::invalid_argument(invalid.to_string()))
}

fn not_found(error: NotFound) -> Status {
    let message = error.to_string();
    match error {
        NotFound::Forbidden { .. } => Status::permission_denied(message),
        NotFound::Aborted { .. } => Status::failed_precondition(message),
        NotFound::Unknown { .. } | NotFound::Released { .. } => Status::not_found(message),
    }
}

fn beyond_end(error: BeyondEnd) -> Status {
    Status::out_of_range(error.to_string())
}

/// Every refusal is final; `node.proto` says what a shim does after each.
fn refuse(refusal: &Refusal) -> Status {
    let message = crate::chain(refusal);
    match refusal {
        Refusal::Fenced { .. } | Refusal::OtherUser { .. } => Status::aborted(message),
        Refusal::TooLate
        | Refusal::OtherStart { .. }
        | Refusal::Taken(_)
        | Refusal::UnknownSlot { .. }
        | Refusal::Broken { .. }
        | Refusal::NotReached => Status::failed_precondition(message),
        Refusal::Full(_)
        | Refusal::NoOutput { .. }
        | Refusal::NoBroker
        | Refusal::Unguarded { .. }
        | Refusal::Journal(_) => Status::resource_exhausted(message),
        Refusal::OtherCommand { .. } | Refusal::Released { .. } => Status::already_exists(message),
        Refusal::Token(_) => Status::permission_denied(message),
        Refusal::Invalid(_) => Status::invalid_argument(message),
    }
}
