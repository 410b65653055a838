//! The server around the service: its listeners, limits of connections, health and reflection,
//! and how the server stops.

use std::{future::pending, sync::Arc, time::Duration};

use axum::middleware;
use polydev_proto::{DESCRIPTORS, runtime::runtime_service_server::RuntimeServiceServer};
use polydev_transport::address::Listener;
use tokio::time::{sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{service::Routes, transport::Server};

use super::{
    api::Api,
    bodies::Bodies,
    grpc::Grpc,
    http,
    identify::{Door, identify},
    incoming, messages,
};
use crate::{
    access::Access,
    approval::Approvals,
    audit::Audit,
    credentials::Vault,
    metrics::Metrics,
    nomad::Nomad,
    permission::Signer,
    policy::RunPolicy,
    pool::View,
    rate::{Rate, Rates},
    run::{
        claim::Turns,
        on_demand::OnDemand,
        queue::{PerUser, Queue},
    },
    token::Tokens,
    traces::Traces,
};

/// The interval between two pings to a caller, and how long the shim waits for an answer. A caller
/// whose process is stopped for a while keeps the connection.
const PING_INTERVAL: Duration = Duration::from_secs(60);
const PING_TIMEOUT: Duration = Duration::from_secs(300);
/// After this time a caller must connect again and identify themselves again. Streams on the old
/// connection continue.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(3600);
/// How long calls may take to end after the hand-over, and the last events to reach callers.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The limits of a shim.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub per_user: PerUser,
    pub rates: Rates,
    /// How many slots of one provider may be on order at a time.
    pub on_demand: usize,
    /// How long runs may continue after the shim is told to stop.
    pub stop: Duration,
}

/// What a shim serves with.
pub struct Parts {
    pub view: View,
    /// `None` with the embedded engine, whose pools keep their first sizes.
    pub nomad: Option<Nomad>,
    pub vault: Arc<Vault>,
    pub access: Access,
    pub policy: Arc<RunPolicy>,
    pub signer: Signer,
    pub approvals: Approvals,
    pub audit: Audit,
    /// `None` if the shim accepts no tokens.
    pub tokens: Option<Tokens>,
    pub traces: Traces,
    pub metrics: Metrics,
    pub limits: Limits,
}

/// Serves callers until `stop`, then gives runs [`Limits::stop`] to end. After that, the callers of
/// the remaining runs are told to attach through another shim.
///
/// # Errors
/// If the server cannot be built, or fails.
pub async fn serve(
    parts: Parts,
    listeners: Vec<Listener>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let Parts {
        view,
        nomad,
        vault,
        access,
        policy,
        signer,
        approvals,
        audit,
        tokens,
        traces,
        metrics,
        limits,
    } = parts;
    let access = Arc::new(access);
    let (runs, hand_over) = (TaskTracker::new(), CancellationToken::new());
    let bodies = Bodies::new();
    let queue = Queue::new(limits.per_user, view.clone());
    metrics.watch(&view, &queue);
    let turns = Turns {
        view: view.clone(),
        queue: queue.clone(),
        approvals: approvals.clone(),
        on_demand: OnDemand::new(nomad.clone(), limits.on_demand),
    };
    let api = Api {
        view,
        nomad,
        vault: vault.clone(),
        access: access.clone(),
        policy,
        signer,
        audit: audit.clone(),
        traces,
        metrics,
        turns,
        user_rate: Rate::new("user", limits.rates.user),
        bodies: bodies.clone(),
        runs: runs.clone(),
        stop: stop.clone(),
        hand_over: hand_over.clone(),
    };
    let api = Arc::new(api);
    let http = http::router(api.clone());
    let grpc = RuntimeServiceServer::new(Grpc(api)).max_decoding_message_size(super::MAX_MESSAGE);
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<RuntimeServiceServer<Grpc>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .with_service_name("polydev.runtime.v1.RuntimeService")
        .build_v1()?;
    let routes = Routes::from(http)
        .add_service(health)
        .add_service(reflection)
        .add_service(grpc);
    // This layer covers all routes, because a browser can also send what looks like gRPC.
    let guarded = middleware::from_fn(http::no_browser);
    let tokens = tokens.map(Arc::new);
    let door = Door {
        tokens: tokens.clone(),
        access,
        audit,
        rate: Rate::new("caller", limits.rates.caller).into(),
    };
    let identified = middleware::from_fn_with_state(door, identify);
    let counted = middleware::from_fn_with_state(bodies, messages::count);
    // The layer that is added last is passed first.
    let routes = routes.into_axum_router();
    let routes = routes.layer(counted).layer(identified).layer(guarded);
    let routes = Routes::from(routes);
    let server = Server::builder()
        .accept_http1(true)
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .max_connection_age(MAX_CONNECTION_AGE)
        .add_routes(routes);

    let stopped = stop.clone().cancelled_owned();
    let serving = server.serve_with_incoming_shutdown(incoming::incoming(listeners), stopped);
    let overrun = async {
        stop.cancelled().await;
        approvals.close();
        runs.close();
        if timeout(limits.stop, runs.wait()).await.is_err() {
            tracing::info!(runs = runs.len(), "handing over the remaining runs");
            hand_over.cancel();
            let _left = timeout(FLUSH_TIMEOUT, runs.wait()).await;
        }
        // The last events may still be on their way to callers.
        sleep(FLUSH_TIMEOUT).await;
    };
    tokio::select! {
        served = serving => served?,
        () = overrun => {}
        () = vault.keep() => unreachable!("it never ends"),
        () = queue.keep() => unreachable!("it never ends"),
        () = keep(tokens) => unreachable!("it never ends"),
    }
    Ok(())
}

async fn keep(tokens: Option<Arc<Tokens>>) {
    match tokens {
        Some(tokens) => tokens.keep().await,
        None => pending().await,
    }
}
