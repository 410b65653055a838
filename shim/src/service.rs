//! `polydev.runtime.v1`: decodes, asks `run` and `pool`, encodes. The calls about pools are in
//! [`pools`], those about credentials in [`credentials`], those that tell of runs in [`runs`]. Who calls is found out in [`incoming`],
//! and whether he may in [`allow`]; what serves it is [`server`], and [`http`] for callers without gRPC, which
//! share [`calls`]; runs are carried in [`carry`]. How errors are told is in [`status`].

mod allow;
mod calls;
mod carry;
mod cluster;
mod credentials;
mod http;
mod identify;
mod incoming;
mod page;
mod pools;
mod runs;
mod server;
mod status;

pub use server::{Limits, Parts, serve};

use std::{pin::Pin, sync::Arc, time::Instant};

use axum::http::HeaderMap;
use futures_util::{Stream, StreamExt};
use polydev_proto::{
    node::TraceContext,
    runtime::{
        AllocateRequest, AllocateResponse, AttachRequest, AttachResponse, CancelRunRequest,
        CancelRunResponse, DeleteCredentialRequest, DeleteCredentialResponse, DrainPoolRequest,
        DrainPoolResponse, GetClusterStatusRequest, GetClusterStatusResponse, GetPoolRequest,
        GetPoolResponse, GetRunRequest, GetRunResponse, InputFile, ListCredentialsRequest,
        ListCredentialsResponse, ListPoolsRequest, ListPoolsResponse, ListRunsRequest,
        ListRunsResponse, PutCredentialRequest, PutCredentialResponse, ReleaseRequest,
        ReleaseResponse, ResumePoolRequest, ResumePoolResponse, RotateCredentialsRequest,
        RotateCredentialsResponse, RunRequest, RunResponse, RunStart, ScalePoolRequest,
        ScalePoolResponse, SubmitJobRequest, SubmitJobResponse, WatchPoolsRequest,
        WatchPoolsResponse, WatchRunsRequest, WatchRunsResponse, attach_request, input_file,
        run_request, runtime_service_server::RuntimeService,
    },
};
use tokio::time::{Duration, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

use allow::caller;

use crate::{
    access::{Access, Action},
    credentials::Vault,
    nomad::Nomad,
    pool::View,
    rate::Rate,
    run::{Error, attach::Name, on_demand::OnDemand, queue::Queue, request},
};

const FIRST_MESSAGE: Duration = Duration::from_secs(10);

struct Service {
    view: View,
    /// `None` with the embedded engine, whose pools are as they were started.
    nomad: Option<Nomad>,
    vault: Arc<Vault>,
    access: Access,
    queue: Queue,
    on_demand: OnDemand,
    user_rate: Rate,
    runs: TaskTracker,
    /// Nothing new begins.
    stop: CancellationToken,
    /// What goes on is for another shim to tell.
    hand_over: CancellationToken,
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl RuntimeService for Service {
    type RunStream = Responses<RunResponse>;
    type AttachStream = Responses<AttachResponse>;
    type WatchRunsStream = Responses<WatchRunsResponse>;
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
        let caller = caller(&request);
        let mut requests = request.into_inner();
        let Some(run_request::Message::Start(start)) = first(&mut requests).await?.message else {
            return Err(Error::from(request::Invalid::NotStarted).into());
        };
        let requests = requests.map(|request| {
            Ok(match request?.message {
                Some(run_request::Message::Input(input)) => Some(input),
                Some(run_request::Message::Start(_)) | None => None,
            })
        });
        let run = self.run_of(*start, trace, &caller, received, requests.boxed());
        let (_, events) = run.await?;
        let responses = events.map(|event| {
            Ok(RunResponse {
                event: Some(event?),
            })
        });
        Ok(Response::new(Box::pin(responses)))
    }

    async fn submit_job(
        &self,
        request: Request<SubmitJobRequest>,
    ) -> Result<Response<SubmitJobResponse>, Status> {
        let trace = trace_context(request.metadata().as_ref());
        let caller = caller(&request);
        let start = request.into_inner().start.unwrap_or_default();
        let accepted = Some(self.submit(start, trace, &caller).await?);
        Ok(Response::new(SubmitJobResponse { accepted }))
    }

    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        let caller = caller(&request);
        let allocated = self.allocate_for(request.into_inner(), &caller).await?;
        Ok(Response::new(allocated))
    }

    async fn release(
        &self,
        request: Request<ReleaseRequest>,
    ) -> Result<Response<ReleaseResponse>, Status> {
        let caller = caller(&request);
        let released = self.release_of(request.into_inner(), &caller).await?;
        Ok(Response::new(released))
    }

    async fn attach(
        &self,
        request: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let received = Instant::now();
        let caller = caller(&request);
        let mut requests = request.into_inner();
        let Some(attach_request::Message::Start(start)) = first(&mut requests).await?.message
        else {
            return Err(Error::from(request::Invalid::NotStarted).into());
        };
        let name = Name::parse(&start.run_id, start.user_id)?;
        let offsets = [
            start.stdout_offset,
            start.stderr_offset,
            start.artifact_offset,
        ];
        let requests = requests.map(|request| {
            Ok(match request?.message {
                Some(attach_request::Message::Input(input)) => Some(input),
                Some(attach_request::Message::Start(_)) | None => None,
            })
        });
        let run = self.attach_to(name, offsets, &caller, received, requests.boxed());
        let responses = run.await?.map(|event| {
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
        let caller = caller(&request);
        let cancelled = self.cancel(request.into_inner(), &caller).await?;
        Ok(Response::new(cancelled))
    }

    async fn get_run(
        &self,
        request: Request<GetRunRequest>,
    ) -> Result<Response<GetRunResponse>, Status> {
        let caller = caller(&request);
        let GetRunRequest { run_id, user_id } = request.into_inner();
        let name = Name::parse(&run_id, user_id)?;
        self.check_run(&caller, &name).await?;
        Ok(Response::new(runs::get(&self.view, &name).await?))
    }

    async fn list_runs(
        &self,
        request: Request<ListRunsRequest>,
    ) -> Result<Response<ListRunsResponse>, Status> {
        let caller = caller(&request);
        let page = self.list_of(request.into_inner(), &caller).await?;
        Ok(Response::new(page))
    }

    async fn watch_runs(
        &self,
        request: Request<WatchRunsRequest>,
    ) -> Result<Response<Self::WatchRunsStream>, Status> {
        let WatchRunsRequest { user_id, provider } = request.get_ref();
        self.check_runs(&caller(&request), user_id, provider)?;
        let changes = runs::watch(self.view.clone(), request.into_inner(), self.stop.clone())?;
        Ok(Response::new(Box::pin(changes.map(Ok))))
    }

    async fn list_pools(
        &self,
        request: Request<ListPoolsRequest>,
    ) -> Result<Response<ListPoolsResponse>, Status> {
        self.check(&caller(&request), Action::Look)?;
        Ok(Response::new(pools::list(&self.view)))
    }

    async fn get_pool(
        &self,
        request: Request<GetPoolRequest>,
    ) -> Result<Response<GetPoolResponse>, Status> {
        self.check(&caller(&request), Action::Look)?;
        let provider = pools::provider(&request.into_inner().provider)?;
        Ok(Response::new(pools::get(&self.view, provider)))
    }

    async fn watch_pools(
        &self,
        request: Request<WatchPoolsRequest>,
    ) -> Result<Response<Self::WatchPoolsStream>, Status> {
        self.check(&caller(&request), Action::Look)?;
        let changes = pools::watch(self.view.clone()).map(Ok);
        Ok(Response::new(Box::pin(changes)))
    }

    async fn scale_pool(
        &self,
        request: Request<ScalePoolRequest>,
    ) -> Result<Response<Self::ScalePoolStream>, Status> {
        let provider = pools::provider(&request.get_ref().provider)?;
        self.check(&caller(&request), Action::Scale { provider })?;
        let size = request.into_inner().size;
        let events = pools::scale(self.tasks(), self.nomad()?, provider, size);
        Ok(Response::new(Box::pin(events)))
    }

    async fn drain_pool(
        &self,
        request: Request<DrainPoolRequest>,
    ) -> Result<Response<Self::DrainPoolStream>, Status> {
        let provider = pools::provider(&request.get_ref().provider)?;
        self.check(&caller(&request), Action::Scale { provider })?;
        let events = pools::drain(self.tasks(), self.nomad()?, self.view.clone(), provider);
        Ok(Response::new(Box::pin(events)))
    }

    async fn resume_pool(
        &self,
        request: Request<ResumePoolRequest>,
    ) -> Result<Response<Self::ResumePoolStream>, Status> {
        let provider = pools::provider(&request.get_ref().provider)?;
        self.check(&caller(&request), Action::Scale { provider })?;
        let events = pools::resume(self.tasks(), self.nomad()?, provider);
        Ok(Response::new(Box::pin(events)))
    }

    async fn get_cluster_status(
        &self,
        request: Request<GetClusterStatusRequest>,
    ) -> Result<Response<GetClusterStatusResponse>, Status> {
        self.check(&caller(&request), Action::Look)?;
        Ok(Response::new(cluster::status(&self.view).await))
    }

    async fn put_credential(
        &self,
        request: Request<PutCredentialRequest>,
    ) -> Result<Response<PutCredentialResponse>, Status> {
        let PutCredentialRequest {
            user_id, provider, ..
        } = request.get_ref();
        self.check_credentials(&request, user_id, provider)?;
        let kept = credentials::put(&self.vault, request.into_inner()).await?;
        Ok(Response::new(kept))
    }

    async fn list_credentials(
        &self,
        request: Request<ListCredentialsRequest>,
    ) -> Result<Response<ListCredentialsResponse>, Status> {
        let ListCredentialsRequest {
            user_id, provider, ..
        } = request.get_ref();
        self.check_credentials(&request, user_id, provider)?;
        let page = credentials::list(&self.vault, request.into_inner()).await?;
        Ok(Response::new(page))
    }

    async fn delete_credential(
        &self,
        request: Request<DeleteCredentialRequest>,
    ) -> Result<Response<DeleteCredentialResponse>, Status> {
        let DeleteCredentialRequest { user_id, provider } = request.get_ref();
        self.check_credentials(&request, user_id, provider)?;
        let deleted = credentials::delete(&self.vault, request.into_inner()).await?;
        Ok(Response::new(deleted))
    }

    async fn rotate_credentials(
        &self,
        request: Request<RotateCredentialsRequest>,
    ) -> Result<Response<RotateCredentialsResponse>, Status> {
        self.check_credentials(&request, "", "")?;
        let rotated = credentials::rotate(&self.vault, request.into_inner()).await?;
        Ok(Response::new(rotated))
    }
}

impl Service {
    fn tasks(&self) -> pools::Tasks<'_> {
        pools::Tasks {
            tracker: &self.runs,
            stop: &self.stop,
        }
    }

    fn nomad(&self) -> Result<Nomad, Status> {
        self.nomad.clone().ok_or_else(|| {
            let reason = "without Nomad the pools are as `--pool` says";
            Status::unimplemented(reason)
        })
    }
}

/// A run of a call that sends nothing but its start.
fn without_stdin(start: RunStart) -> Result<RunStart, Error> {
    if start.stdin {
        return Err(Error::Invalid(request::Invalid::Value {
            field: "stdin",
            given: "true".into(),
            allowed: "false: nobody would send any",
        }));
    }
    let follows = |file: &InputFile| matches!(file.source, Some(input_file::Source::Size(1..)));
    if start.files.iter().any(follows) {
        return Err(Error::Invalid(request::Invalid::Value {
            field: "files",
            given: "some by their size".into(),
            allowed: "files with their `content`: nobody would send any",
        }));
    }
    Ok(start)
}

/// A caller says what it wants at once.
async fn first<T>(requests: &mut Streaming<T>) -> Result<T, Status> {
    let first = timeout(FIRST_MESSAGE, requests.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("no `start` came in 10 s"))??;
    first.ok_or_else(|| Error::from(request::Invalid::NotStarted).into())
}

/// The caller's place in a trace, as W3C has it in headers.
fn trace_context(headers: &HeaderMap) -> Option<TraceContext> {
    let text = |name| {
        let value = headers.get(name)?.to_str().ok()?;
        Some(value.to_owned())
    };
    let traceparent = text("traceparent")?;
    Some(TraceContext {
        traceparent,
        tracestate: text("tracestate").unwrap_or_default(),
    })
}
