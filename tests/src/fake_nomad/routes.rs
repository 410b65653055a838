//! The answers of the simulated Nomad.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Json, Router,
    extract::{Path, Query, Request, State},
    http::StatusCode,
    middleware::{self, Next},
    response::{AppendHeaders, IntoResponse, Response},
    routing::{delete, get, post},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{Cluster, Dispatched, GROUP, Inner, Mood};

/// How long a query waits for a change, as the shim requests.
const WAIT: Duration = Duration::from_secs(60);

type Shared = State<Arc<Cluster>>;
type Answer = Result<Response, Refusal>;
type Refusal = (StatusCode, &'static str);

pub(super) fn router(cluster: Arc<Cluster>) -> Router {
    Router::new()
        .route("/v1/nodes", get(nodes))
        .route("/v1/job/{job}/scale", get(scaling).post(scale))
        .route("/v1/job/{job}/dispatch", post(dispatch))
        .route("/v1/job/{job}/{child}", delete(stop))
        .route("/v1/job/{job}/{child}/allocations", get(allocations))
        .layer(middleware::from_fn_with_state(cluster.clone(), checked))
        .with_state(cluster)
}

/// Notes a request, and refuses one with a wrong token as Nomad does.
async fn checked(State(cluster): Shared, request: Request, next: Next) -> Response {
    let token = request.headers().get("x-nomad-token");
    let token = token.and_then(|token| token.to_str().ok());
    let is_right = {
        let mut inner = cluster.lock();
        inner.asked.push(request.uri().to_string());
        inner.token.is_none() || inner.token.as_deref() == token
    };
    match is_right {
        true => next.run(request).await,
        false => (StatusCode::FORBIDDEN, "Permission denied").into_response(),
    }
}

#[derive(Deserialize)]
struct Blocking {
    #[serde(default)]
    index: u64,
}

#[derive(Deserialize)]
struct Dispatching {
    idempotency_token: String,
}

impl Cluster {
    /// Waits until Nomad is not stalled. Fails if Nomad fails.
    async fn ask(&self) -> Result<(), Refusal> {
        let mut changes = self.index.subscribe();
        loop {
            changes.mark_unchanged();
            match self.lock().mood {
                Mood::Well | Mood::Leaderless => return Ok(()),
                Mood::Failing => return Err((StatusCode::INTERNAL_SERVER_ERROR, "a server fails")),
                Mood::Stalled => {}
            }
            // The channel stays open: `self` has the sender.
            let _changed = changes.changed().await;
        }
    }

    /// As [`Cluster::ask`], once something is newer than `index`, or after a minute.
    async fn ask_after(&self, index: u64) -> Result<(), Refusal> {
        let mut changes = self.index.subscribe();
        let newer = async { drop(changes.wait_for(|now| *now > index).await) };
        let _nothing_is_newer = timeout(WAIT, newer).await;
        self.ask().await
    }

    /// The answer to a blocking query.
    fn answer(&self, body: impl FnOnce(&Inner) -> Value) -> Response {
        let inner = self.lock();
        let index = self.index.borrow().to_string();
        let is_known = inner.mood != Mood::Leaderless;
        let body = match is_known {
            true => body(&inner),
            false => json!([]),
        };
        let headers = [
            ("X-Nomad-Index", index),
            ("X-Nomad-KnownLeader", is_known.to_string()),
        ];
        (AppendHeaders(headers), Json(body)).into_response()
    }
}

const NO_JOB: Refusal = (StatusCode::NOT_FOUND, "job not found");

async fn nodes(State(cluster): Shared, Query(query): Query<Blocking>) -> Answer {
    cluster.lock().lists += 1;
    cluster.ask_after(query.index).await?;
    Ok(cluster.answer(|inner| inner.nodes.values().cloned().collect()))
}

async fn scaling(State(cluster): Shared, Path(job): Path<String>) -> Answer {
    cluster.ask().await?;
    let inner = cluster.lock();
    let pool = inner.pools.get(&job).ok_or(NO_JOB)?;
    let group = json!({ "Desired": pool.size, "Events": pool.events });
    Ok(Json(json!({ "JobID": job, "TaskGroups": { GROUP: group } })).into_response())
}

async fn scale(State(cluster): Shared, Path(job): Path<String>, body: String) -> Answer {
    cluster.ask().await?;
    let body: Value = serde_json::from_str(&body).unwrap_or_default();
    let count = body["Count"]
        .as_u64()
        .and_then(|count| u32::try_from(count).ok());
    let count = count.ok_or((StatusCode::BAD_REQUEST, "no count"))?;
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let time = u64::try_from(now.as_nanos()).unwrap_or(0);
    cluster.change(|inner| {
        let pool = inner.pools.get_mut(&job).ok_or(NO_JOB)?;
        if pool.deploying {
            pool.refused += 1;
            let words = "job scaling blocked due to active deployment";
            return Err((StatusCode::BAD_REQUEST, words));
        }
        pool.size = count;
        let event = json!({ "Time": time, "Error": false, "Meta": body["Meta"] });
        pool.events.push(event);
        Ok(Json(json!({})).into_response())
    })
}

async fn dispatch(
    State(cluster): Shared,
    Path(job): Path<String>,
    Query(query): Query<Dispatching>,
    body: String,
) -> Answer {
    cluster.ask().await?;
    let body: Value = serde_json::from_str(&body).unwrap_or_default();
    let run_id = body["Meta"]["run_id"].as_str().unwrap_or_default();
    cluster.change(|inner| {
        if !inner.on_demand.contains(&job) {
            let words = "parameterized job not found";
            return Err((StatusCode::INTERNAL_SERVER_ERROR, words));
        }
        let Dispatching { idempotency_token } = query;
        let mut dispatched = inner.dispatched.iter();
        let before = dispatched.find(|before| before.idempotency_token == idempotency_token);
        let child = match before {
            Some(before) => before.job.clone(),
            None => {
                let child = format!("{job}/dispatch-{}", inner.dispatched.len() + 1);
                inner.dispatched.push(Dispatched {
                    job: child.clone(),
                    run_id: run_id.to_owned(),
                    idempotency_token,
                });
                child
            }
        };
        Ok(Json(json!({ "DispatchedJobID": child })).into_response())
    })
}

async fn stop(State(cluster): Shared, Path((job, child)): Path<(String, String)>) -> Answer {
    cluster.ask().await?;
    let stopped = format!("{job}/{child}");
    cluster.change(|inner| inner.stopped.push(stopped));
    Ok(Json(json!({})).into_response())
}

/// The nodes of the tests have slots without Nomad. Each child job has one pending allocation.
async fn allocations(
    State(cluster): Shared,
    Path((job, child)): Path<(String, String)>,
    Query(query): Query<Blocking>,
) -> Answer {
    cluster.ask_after(query.index).await?;
    let job = format!("{job}/{child}");
    Ok(cluster.answer(|inner| {
        let is_it = |dispatched: &&Dispatched| dispatched.job == job;
        let dispatched = inner.dispatched.iter().filter(is_it);
        dispatched
            .map(|_| json!({ "ClientStatus": "pending" }))
            .collect()
    }))
}
