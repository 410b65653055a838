//! The same service for callers without gRPC: JSON over HTTP at the same listeners, with the
//! same rules, and events as server-sent events. The messages are those of
//! `polydev.runtime.v1`, in protobuf's JSON form; [`openapi`] describes them.

mod error;
mod guard;
mod json;
mod openapi;

pub(super) use error::Problem;
pub(super) use guard::no_browser;

use std::{convert::Infallible, sync::Arc, time::Instant};

use axum::{
    Extension, Router,
    body::{Body, to_bytes},
    extract::{
        Path, Query, Request, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::{
        HeaderMap, StatusCode,
        header::{CONTENT_TYPE, LOCATION},
    },
    response::{
        IntoResponse, Response,
        sse::{KeepAlive, Sse},
    },
    routing::{get, post},
};
use futures_util::{Stream, StreamExt, future, stream};
use polydev_proto::runtime::{
    AllocateRequest, CancelRunRequest, ListRunsRequest, ReleaseRequest, RunEvent, SubmitJobRequest,
    SubmitJobResponse, run_event::Event,
};
use serde::Deserialize;
use tokio::time::timeout;
use tonic::Status;

use super::{FIRST_MESSAGE, Service, cluster, pools, runs, server::MESSAGE_MOST, trace_context};
use crate::{
    access::{Action, Caller},
    run::attach::Name,
};

/// What JSON makes of a message: letters that are not ASCII may take three times as much.
const BODY_MOST: usize = 3 * MESSAGE_MOST;

/// After the id of a run's last event.
const END: &str = ".end";

type Answer = Result<Response, Problem>;

/// All paths.
pub(super) fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/v1/runs", post(start).get(list))
        .route("/v1/runs/{run_id}", get(show))
        .route("/v1/runs/{run_id}/events", get(attach))
        .route("/v1/runs/{run_id}/cancel", post(cancel))
        .route("/v1/leases", post(allocate))
        .route("/v1/leases/{lease_id}/release", post(release))
        .route("/v1/pools", get(list_pools))
        .route("/v1/pools/{provider}", get(show_pool))
        .route("/v1/status", get(status))
        .route("/v1/openapi.json", get(openapi::document))
        .fallback(nowhere)
        .method_not_allowed_fallback(|| future::ready(Problem::method()))
        .with_state(service)
}

/// Whose run it is, of calls that name a run in their path.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfUser {
    user_id: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Starting {
    /// Answer when the run has a slot, and do not stream it.
    #[serde(default)]
    detach: bool,
}

async fn start(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<Starting>, QueryRejection>,
    request: Request,
) -> Answer {
    let received = Instant::now();
    let Query(Starting { detach }) = query?;
    let trace = trace_context(request.headers());
    let SubmitJobRequest { start } = body(request).await?;
    let start = start.unwrap_or_default();
    if detach {
        let accepted = Some(service.submit(start, trace, &caller).await?);
        return Ok(json::answer(&SubmitJobResponse { accepted }));
    }
    let start = super::without_stdin(start)?;
    // The caller says no more, and does not close anything either.
    let silent = stream::pending().boxed();
    let run = service.run_of(start, trace, &caller, received, silent);
    let (run_id, events) = run.await?;
    let answer = sent(events, [0; 3]).await?;
    // Also for a caller whose stream breaks before it has heard of it.
    let location = [(LOCATION, format!("/v1/runs/{run_id}"))];
    Ok((location, answer).into_response())
}

async fn attach(
    State(service): State<Arc<Service>>,
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
        // It has all of it: an `EventSource` comes back until it is told so.
        Some(id) if id.as_bytes().ends_with(END.as_bytes()) => {
            return Ok(StatusCode::NO_CONTENT.into_response());
        }
        Some(id) => offsets(id.to_str().unwrap_or_default())?,
        None => [0; 3],
    };
    let silent = stream::pending().boxed();
    let events = service
        .attach_to(name, offsets, &caller, received, silent)
        .await?;
    Ok(sent(events, offsets).await?)
}

async fn show(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<OfUser>, QueryRejection>,
) -> Answer {
    let Path(run_id) = path?;
    let Query(OfUser { user_id }) = query?;
    let name = Name::parse(&run_id, user_id)?;
    service.check_run(&caller, &name).await?;
    Ok(json::answer(&runs::get(&service.view, &name).await?))
}

async fn list(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<json::Fields>, QueryRejection>,
) -> Answer {
    let Query(fields) = query?;
    let request: ListRunsRequest = json::from_fields(fields)?;
    Ok(json::answer(&service.list_of(request, &caller).await?))
}

async fn cancel(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Answer {
    let Path(run_id) = path?;
    let named: CancelRunRequest = body(request).await?;
    same("run_id", &run_id, &named.run_id)?;
    let request = CancelRunRequest { run_id, ..named };
    Ok(json::answer(&service.cancel(request, &caller).await?))
}

async fn allocate(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Answer {
    let request: AllocateRequest = body(request).await?;
    Ok(json::answer(&service.allocate_for(request, &caller).await?))
}

async fn release(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Answer {
    let Path(lease_id) = path?;
    let named: ReleaseRequest = body(request).await?;
    same("lease_id", &lease_id, &named.lease_id)?;
    let request = ReleaseRequest { lease_id, ..named };
    Ok(json::answer(&service.release_of(request, &caller).await?))
}

async fn list_pools(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Caller>,
) -> Answer {
    service.check(&caller, Action::Look)?;
    Ok(json::answer(&pools::list(&service.view)))
}

async fn show_pool(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
) -> Answer {
    let Path(provider) = path?;
    service.check(&caller, Action::Look)?;
    let provider = pools::provider(&provider)?;
    Ok(json::answer(&pools::get(&service.view, provider)))
}

async fn status(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Caller>,
) -> Answer {
    service.check(&caller, Action::Look)?;
    Ok(json::answer(&cluster::status(&service.view).await))
}

/// The message in a request's body.
async fn body<M: json::Message>(request: Request) -> Result<M, Problem> {
    let kind = request.headers().get(CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    // Pages of other sites can send none without being asked first, and are refused then.
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(Problem::media_type(kind));
    }
    let read = timeout(
        FIRST_MESSAGE,
        to_bytes(Body::new(request.into_body()), BODY_MOST),
    )
    .await;
    let late = |_| Status::deadline_exceeded("the body did not come in 10 s");
    let bytes = read.map_err(late)?;
    let bytes = bytes.map_err(|error| Problem::body(&error, BODY_MOST))?;
    json::from_slice(&bytes)
}

/// What a path names, a body may name too.
fn same(field: &str, path: &str, body: &str) -> Result<(), Status> {
    if body.is_empty() || path == body {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "`{field}` is `{body}`, and `{path}` in the path"
    )))
}

/// The events as they come. What goes wrong before the first has a status of its own.
async fn sent(
    events: impl Stream<Item = Result<RunEvent, Status>> + Send + 'static,
    offsets: [u64; 3],
) -> Result<Response, Status> {
    let mut events = Box::pin(events);
    let first = events.next().await.transpose()?;
    let events = stream::iter(first.map(Ok)).chain(events);
    let events = events.scan(offsets, |offsets, event| {
        let event = match event {
            Ok(event) => {
                advance(offsets, &event);
                let mut id = offsets.map(|offset| offset.to_string()).join(".");
                if let Some(Event::Exited(_)) = event.event {
                    id.push_str(END);
                }
                json::event(&event).id(id)
            }
            Err(status) => Problem::from(status).event(),
        };
        future::ready(Some(Ok::<_, Infallible>(event)))
    });
    Ok(Sse::new(events)
        .keep_alive(KeepAlive::default())
        .into_response())
}

/// How much of stdout, stderr and artifacts a caller has that has this event: the event's id,
/// which a caller that comes back gives as `Last-Event-ID`.
fn advance(offsets: &mut [u64; 3], event: &RunEvent) {
    let (stream, end) = match &event.event {
        Some(Event::Stdout(output)) => (0, output.offset + output.data.len() as u64),
        Some(Event::Stderr(output)) => (1, output.offset + output.data.len() as u64),
        Some(Event::ArtifactData(output)) => (2, output.offset + output.data.len() as u64),
        Some(Event::Lost(lost)) => match lost.stream {
            stream @ 1..=3 => (usize::try_from(stream - 1).unwrap_or(0), lost.to),
            _ => return,
        },
        _ => return,
    };
    offsets[stream] = end;
}

fn offsets(id: &str) -> Result<[u64; 3], Status> {
    let parts: Result<Vec<u64>, _> = id.split('.').map(str::parse).collect();
    let parts = parts
        .ok()
        .and_then(|parts| <[u64; 3]>::try_from(parts).ok());
    parts.ok_or_else(|| {
        Status::invalid_argument(format!(
            "`Last-Event-ID` is `{id}`, allowed is the id of an event"
        ))
    })
}

async fn nowhere() -> Problem {
    Problem::nowhere()
}
