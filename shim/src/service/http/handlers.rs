//! The handlers of all paths: each decodes a request, asks [`Api`], and encodes the answer.

use std::{sync::Arc, time::Instant};

use axum::{
    Extension,
    extract::{
        Path, Query, Request, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::{HeaderMap, StatusCode, header::LOCATION},
    response::{IntoResponse, Response},
};
use polydev_proto::{
    runtime::{
        AllocateRequest, ApproveRequest, CancelRunRequest, DenyRequest, GetApprovalRequest,
        GetPoolRequest, GetRunRequest, ListApprovalsRequest, ListRunsRequest, ReleaseRequest,
        RunScriptRequest, SubmitJobRequest,
    },
    stream::PerStream,
};
use serde::Deserialize;

use super::{
    body::{body, same},
    error::Problem,
    events, json,
};
use crate::{
    access::Caller,
    run::attach::Name,
    service::{api::Api, trace::trace_context},
};

type Answer = Result<Response, Problem>;

/// The user of the run, for calls that name a run in the path.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OfUser {
    user_id: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Starting {
    /// Answer when the run has a slot, and do not stream it.
    #[serde(default)]
    detach: bool,
}

pub(super) async fn start(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<Starting>, QueryRejection>,
    request: Request,
) -> Answer {
    let received = Instant::now();
    let Query(Starting { detach }) = query?;
    let trace = trace_context(request.headers());
    let request: SubmitJobRequest = body(&api.bodies, request).await?;
    if detach {
        let accepted = api.submit_job(&caller, request, trace).await?;
        return Ok(json::answer(&accepted));
    }
    let start = request.start.unwrap_or_default();
    let run = api.run(&caller, start, trace, received, None);
    let (run_id, events) = run.await?;
    let answer = events::answer(events, PerStream::default()).await?;
    // A caller whose stream breaks before the first event needs the run's id too.
    let location = [(LOCATION, format!("/v1/runs/{run_id}"))];
    Ok((location, answer).into_response())
}

pub(super) async fn run_script(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Answer {
    let received = Instant::now();
    let trace = trace_context(request.headers());
    let request: RunScriptRequest = body(&api.bodies, request).await?;
    let result = api.run_script(&caller, request, trace, received).await?;
    Ok(json::answer(&result))
}

pub(super) async fn attach(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<OfUser>, QueryRejection>,
    headers: HeaderMap,
) -> Answer {
    let Path(run_id) = path?;
    let received = Instant::now();
    let Query(OfUser { user_id }) = query?;
    let name = Name::parse(&run_id, user_id)?;
    let offsets = match headers.get("last-event-id") {
        // The caller has all events. An `EventSource` reconnects until it receives this answer.
        Some(id) if events::is_last(id.as_bytes()) => {
            return Ok(StatusCode::NO_CONTENT.into_response());
        }
        Some(id) => events::offsets(id.to_str().unwrap_or_default())?,
        None => PerStream::default(),
    };
    let run = api.attach(&caller, name, offsets, received, None);
    Ok(events::answer(run.await?, offsets).await?)
}

pub(super) async fn show(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<OfUser>, QueryRejection>,
) -> Answer {
    let Path(run_id) = path?;
    let Query(OfUser { user_id }) = query?;
    let request = GetRunRequest { run_id, user_id };
    Ok(json::answer(&api.get_run(&caller, request).await?))
}

pub(super) async fn list(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<json::Fields>, QueryRejection>,
) -> Answer {
    let Query(fields) = query?;
    let request: ListRunsRequest = json::from_fields(fields)?;
    Ok(json::answer(&api.list_runs(&caller, request).await?))
}

pub(super) async fn cancel(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Answer {
    let Path(run_id) = path?;
    let named: CancelRunRequest = body(&api.bodies, request).await?;
    same("run_id", &run_id, &named.run_id)?;
    let request = CancelRunRequest { run_id, ..named };
    Ok(json::answer(&api.cancel_run(&caller, request).await?))
}

pub(super) async fn allocate(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Answer {
    let request: AllocateRequest = body(&api.bodies, request).await?;
    Ok(json::answer(&api.allocate(&caller, request).await?))
}

pub(super) async fn release(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Answer {
    let Path(lease_id) = path?;
    let named: ReleaseRequest = body(&api.bodies, request).await?;
    same("lease_id", &lease_id, &named.lease_id)?;
    let request = ReleaseRequest { lease_id, ..named };
    Ok(json::answer(&api.release(&caller, request).await?))
}

pub(super) async fn list_approvals(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<json::Fields>, QueryRejection>,
) -> Answer {
    let Query(fields) = query?;
    let request: ListApprovalsRequest = json::from_fields(fields)?;
    Ok(json::answer(&api.list_approvals(&caller, request)?))
}

pub(super) async fn show_approval(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
) -> Answer {
    let Path(approval_id) = path?;
    let request = GetApprovalRequest { approval_id };
    Ok(json::answer(&api.get_approval(&caller, request)?))
}

pub(super) async fn approve(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Answer {
    let Path(approval_id) = path?;
    let named: ApproveRequest = body(&api.bodies, request).await?;
    same("approval_id", &approval_id, &named.approval_id)?;
    let request = ApproveRequest {
        approval_id,
        ..named
    };
    Ok(json::answer(&api.approve(&caller, request)?))
}

pub(super) async fn deny(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Answer {
    let Path(approval_id) = path?;
    let named: DenyRequest = body(&api.bodies, request).await?;
    same("approval_id", &approval_id, &named.approval_id)?;
    let request = DenyRequest {
        approval_id,
        ..named
    };
    Ok(json::answer(&api.deny(&caller, request)?))
}

pub(super) async fn list_pools(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
) -> Answer {
    Ok(json::answer(&api.list_pools(&caller)?))
}

pub(super) async fn show_pool(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
) -> Answer {
    let Path(provider) = path?;
    let request = GetPoolRequest { provider };
    Ok(json::answer(&api.get_pool(&caller, request)?))
}

pub(super) async fn status(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
) -> Answer {
    Ok(json::answer(&api.get_cluster_status(&caller).await?))
}
