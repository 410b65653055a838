//! The calls over gRPC: decodes each, asks [`Api`], and encodes the answer.

use std::{pin::Pin, sync::Arc, time::Instant};

use futures_util::{Stream, StreamExt};
use polydev_proto::runtime::{
    AllocateRequest, AllocateResponse, ApproveRequest, ApproveResponse, AttachRequest,
    AttachResponse, CancelRunRequest, CancelRunResponse, DeleteCredentialRequest,
    DeleteCredentialResponse, DenyRequest, DenyResponse, DrainPoolRequest, DrainPoolResponse,
    GetApprovalRequest, GetApprovalResponse, GetClusterStatusRequest, GetClusterStatusResponse,
    GetPoolRequest, GetPoolResponse, GetRunRequest, GetRunResponse, ListApprovalsRequest,
    ListApprovalsResponse, ListCredentialsRequest, ListCredentialsResponse, ListImagesRequest,
    ListImagesResponse, ListPoolsRequest, ListPoolsResponse, ListRunsRequest, ListRunsResponse,
    PruneImagesRequest, PruneImagesResponse, PutCredentialRequest, PutCredentialResponse,
    ReleaseRequest, ReleaseResponse, ResumePoolRequest, ResumePoolResponse,
    RotateCredentialsRequest, RotateCredentialsResponse, RunInput, RunRequest, RunResponse,
    RunScriptRequest, RunScriptResponse, ScalePoolRequest, ScalePoolResponse, SubmitJobRequest,
    SubmitJobResponse, WatchApprovalsRequest, WatchApprovalsResponse, WatchPoolsRequest,
    WatchPoolsResponse, WatchRunsRequest, WatchRunsResponse, attach_request, run_request,
    runtime_service_server::RuntimeService,
};
use polydev_proto::stream::PerStream;
use tokio::time::timeout;
use tonic::{Request, Response, Status, Streaming};

use super::{FIRST_MESSAGE_TIMEOUT, api::Api, trace::trace_context};
use crate::{
    access::Caller,
    run::{Error, attach::Name, relay::Inputs, request::Invalid},
};

/// [`Api`] for callers that use gRPC.
pub(super) struct Grpc(pub(super) Arc<Api>);

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl RuntimeService for Grpc {
    type RunStream = Responses<RunResponse>;
    type AttachStream = Responses<AttachResponse>;
    type WatchRunsStream = Responses<WatchRunsResponse>;
    type WatchApprovalsStream = Responses<WatchApprovalsResponse>;
    type WatchPoolsStream = Responses<WatchPoolsResponse>;
    type ScalePoolStream = Responses<ScalePoolResponse>;
    type DrainPoolStream = Responses<DrainPoolResponse>;
    type ResumePoolStream = Responses<ResumePoolResponse>;

    async fn run(
        &self,
        request: Request<Streaming<RunRequest>>,
    ) -> Result<Response<Self::RunStream>, Status> {
        let received = Instant::now();
        let trace = trace_context(request.metadata().as_ref());
        let (caller, mut requests) = parts(request)?;
        let Some(run_request::Message::Start(start)) = first(&mut requests).await?.message else {
            return Err(Error::from(Invalid::NotStarted).into());
        };
        let inputs = inputs(requests, |request: RunRequest| match request.message {
            Some(run_request::Message::Input(input)) => Some(input),
            Some(run_request::Message::Start(_)) | None => None,
        });
        let run = self.0.run(&caller, *start, trace, received, Some(inputs));
        let (_, events) = run.await?;
        let responses = events.map(|event| event.map(|event| RunResponse { event: Some(event) }));
        Ok(Response::new(Box::pin(responses)))
    }

    async fn submit_job(
        &self,
        request: Request<SubmitJobRequest>,
    ) -> Result<Response<SubmitJobResponse>, Status> {
        let trace = trace_context(request.metadata().as_ref());
        let (caller, request) = parts(request)?;
        let accepted = self.0.submit_job(&caller, request, trace).await?;
        Ok(Response::new(accepted))
    }

    async fn run_script(
        &self,
        request: Request<RunScriptRequest>,
    ) -> Result<Response<RunScriptResponse>, Status> {
        let received = Instant::now();
        let trace = trace_context(request.metadata().as_ref());
        let (caller, request) = parts(request)?;
        let result = self.0.run_script(&caller, request, trace, received).await?;
        Ok(Response::new(result))
    }

    async fn attach(
        &self,
        request: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let received = Instant::now();
        let (caller, mut requests) = parts(request)?;
        let Some(attach_request::Message::Start(start)) = first(&mut requests).await?.message
        else {
            return Err(Error::from(Invalid::NotStarted).into());
        };
        let name = Name::parse(&start.run_id, start.user_id)?;
        let offsets = PerStream::new(
            start.stdout_offset,
            start.stderr_offset,
            start.artifact_offset,
            start.event_offset,
        );
        let inputs = inputs(requests, |request: AttachRequest| match request.message {
            Some(attach_request::Message::Input(input)) => Some(input),
            Some(attach_request::Message::Start(_)) | None => None,
        });
        let run = self
            .0
            .attach(&caller, name, offsets, received, Some(inputs));
        let events = run.await?;
        let responses =
            events.map(|event| event.map(|event| AttachResponse { event: Some(event) }));
        Ok(Response::new(Box::pin(responses)))
    }

    async fn cancel_run(
        &self,
        request: Request<CancelRunRequest>,
    ) -> Result<Response<CancelRunResponse>, Status> {
        let (caller, request) = parts(request)?;
        let cancelled = self.0.cancel_run(&caller, request).await?;
        Ok(Response::new(cancelled))
    }

    async fn get_run(
        &self,
        request: Request<GetRunRequest>,
    ) -> Result<Response<GetRunResponse>, Status> {
        let (caller, request) = parts(request)?;
        let run = self.0.get_run(&caller, request).await?;
        Ok(Response::new(run))
    }

    async fn list_runs(
        &self,
        request: Request<ListRunsRequest>,
    ) -> Result<Response<ListRunsResponse>, Status> {
        let (caller, request) = parts(request)?;
        let page = self.0.list_runs(&caller, request).await?;
        Ok(Response::new(page))
    }

    async fn watch_runs(
        &self,
        request: Request<WatchRunsRequest>,
    ) -> Result<Response<Self::WatchRunsStream>, Status> {
        let (caller, request) = parts(request)?;
        let changes = self.0.watch_runs(&caller, request)?;
        Ok(Response::new(Box::pin(changes.map(Ok))))
    }

    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        let (caller, request) = parts(request)?;
        let allocated = self.0.allocate(&caller, request).await?;
        Ok(Response::new(allocated))
    }

    async fn release(
        &self,
        request: Request<ReleaseRequest>,
    ) -> Result<Response<ReleaseResponse>, Status> {
        let (caller, request) = parts(request)?;
        let released = self.0.release(&caller, request).await?;
        Ok(Response::new(released))
    }

    async fn list_pools(
        &self,
        request: Request<ListPoolsRequest>,
    ) -> Result<Response<ListPoolsResponse>, Status> {
        let (caller, ListPoolsRequest {}) = parts(request)?;
        let pools = self.0.list_pools(&caller)?;
        Ok(Response::new(pools))
    }

    async fn get_pool(
        &self,
        request: Request<GetPoolRequest>,
    ) -> Result<Response<GetPoolResponse>, Status> {
        let (caller, request) = parts(request)?;
        let pool = self.0.get_pool(&caller, request)?;
        Ok(Response::new(pool))
    }

    async fn watch_pools(
        &self,
        request: Request<WatchPoolsRequest>,
    ) -> Result<Response<Self::WatchPoolsStream>, Status> {
        let (caller, WatchPoolsRequest {}) = parts(request)?;
        let changes = self.0.watch_pools(&caller)?;
        Ok(Response::new(Box::pin(changes.map(Ok))))
    }

    async fn scale_pool(
        &self,
        request: Request<ScalePoolRequest>,
    ) -> Result<Response<Self::ScalePoolStream>, Status> {
        let (caller, request) = parts(request)?;
        let events = self.0.scale_pool(&caller, request)?;
        Ok(Response::new(Box::pin(events)))
    }

    async fn drain_pool(
        &self,
        request: Request<DrainPoolRequest>,
    ) -> Result<Response<Self::DrainPoolStream>, Status> {
        let (caller, request) = parts(request)?;
        let events = self.0.drain_pool(&caller, request)?;
        Ok(Response::new(Box::pin(events)))
    }

    async fn resume_pool(
        &self,
        request: Request<ResumePoolRequest>,
    ) -> Result<Response<Self::ResumePoolStream>, Status> {
        let (caller, request) = parts(request)?;
        let events = self.0.resume_pool(&caller, request)?;
        Ok(Response::new(Box::pin(events)))
    }

    async fn get_cluster_status(
        &self,
        request: Request<GetClusterStatusRequest>,
    ) -> Result<Response<GetClusterStatusResponse>, Status> {
        let (caller, GetClusterStatusRequest {}) = parts(request)?;
        let status = self.0.get_cluster_status(&caller).await?;
        Ok(Response::new(status))
    }

    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let (caller, ListImagesRequest {}) = parts(request)?;
        let images = self.0.list_images(&caller).await?;
        Ok(Response::new(images))
    }

    async fn prune_images(
        &self,
        request: Request<PruneImagesRequest>,
    ) -> Result<Response<PruneImagesResponse>, Status> {
        let (caller, request) = parts(request)?;
        let pruned = self.0.prune_images(&caller, request).await?;
        Ok(Response::new(pruned))
    }

    async fn list_approvals(
        &self,
        request: Request<ListApprovalsRequest>,
    ) -> Result<Response<ListApprovalsResponse>, Status> {
        let (caller, request) = parts(request)?;
        let approvals = self.0.list_approvals(&caller, request)?;
        Ok(Response::new(approvals))
    }

    async fn get_approval(
        &self,
        request: Request<GetApprovalRequest>,
    ) -> Result<Response<GetApprovalResponse>, Status> {
        let (caller, request) = parts(request)?;
        let approval = self.0.get_approval(&caller, request)?;
        Ok(Response::new(approval))
    }

    async fn approve(
        &self,
        request: Request<ApproveRequest>,
    ) -> Result<Response<ApproveResponse>, Status> {
        let (caller, request) = parts(request)?;
        let approved = self.0.approve(&caller, request)?;
        Ok(Response::new(approved))
    }

    async fn deny(&self, request: Request<DenyRequest>) -> Result<Response<DenyResponse>, Status> {
        let (caller, request) = parts(request)?;
        let denied = self.0.deny(&caller, request)?;
        Ok(Response::new(denied))
    }

    async fn watch_approvals(
        &self,
        request: Request<WatchApprovalsRequest>,
    ) -> Result<Response<Self::WatchApprovalsStream>, Status> {
        let (caller, request) = parts(request)?;
        let changes = self.0.watch_approvals(&caller, request)?;
        Ok(Response::new(Box::pin(changes.map(Ok))))
    }

    async fn put_credential(
        &self,
        request: Request<PutCredentialRequest>,
    ) -> Result<Response<PutCredentialResponse>, Status> {
        let (caller, request) = parts(request)?;
        let put = self.0.put_credential(&caller, request).await?;
        Ok(Response::new(put))
    }

    async fn list_credentials(
        &self,
        request: Request<ListCredentialsRequest>,
    ) -> Result<Response<ListCredentialsResponse>, Status> {
        let (caller, request) = parts(request)?;
        let page = self.0.list_credentials(&caller, request).await?;
        Ok(Response::new(page))
    }

    async fn delete_credential(
        &self,
        request: Request<DeleteCredentialRequest>,
    ) -> Result<Response<DeleteCredentialResponse>, Status> {
        let (caller, request) = parts(request)?;
        let deleted = self.0.delete_credential(&caller, request).await?;
        Ok(Response::new(deleted))
    }

    async fn rotate_credentials(
        &self,
        request: Request<RotateCredentialsRequest>,
    ) -> Result<Response<RotateCredentialsResponse>, Status> {
        let (caller, request) = parts(request)?;
        let rotated = self.0.rotate_credentials(&caller, request).await?;
        Ok(Response::new(rotated))
    }
}

/// The caller and the message of a request.
fn parts<T>(request: Request<T>) -> Result<(Caller, T), Status> {
    let caller = request.extensions().get::<Caller>().cloned();
    let caller = caller.ok_or_else(|| Status::internal("the request has no caller"))?;
    Ok((caller, request.into_inner()))
}

/// The first message of a call, which must arrive within [`FIRST_MESSAGE_TIMEOUT`].
async fn first<T>(requests: &mut Streaming<T>) -> Result<T, Status> {
    let first = timeout(FIRST_MESSAGE_TIMEOUT, requests.message()).await;
    let first = first
        .map_err(|_| Status::deadline_exceeded("no `start` message arrived within 10 s"))??;
    first.ok_or_else(|| Error::from(Invalid::NotStarted).into())
}

/// The messages after the first. `input` returns `None` for a message that is not allowed there.
fn inputs<T: Send + 'static>(requests: Streaming<T>, input: fn(T) -> Option<RunInput>) -> Inputs {
    requests.map(move |request| request.map(input)).boxed()
}
