//! The server around the service: its listeners, limits of connections, health and reflection,
//! and how it stops.

use std::{future::pending, sync::Arc, time::Duration};

use axum::middleware;
use polydev_proto::{DESCRIPTORS, runtime::runtime_service_server::RuntimeServiceServer};
use polydev_transport::address::Listener;
use tokio::time::{sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{service::Routes, transport::Server};

use super::{
    api::Api,
    grpc::Grpc,
    http,
    identify::{Door, identify},
    incoming,
};
use crate::{
    access::Access,
    credentials::Vault,
    nomad::Nomad,
    pool::View,
    rate::{Rate, Rates},
    run::{
        on_demand::OnDemand,
        queue::{PerUser, Queue},
    },
    token::Tokens,
};

/// Between two pings to a caller, and until one that answers none is gone: one whose process
/// is stopped for a while is not.
const PING: Duration = Duration::from_secs(60);
const GONE: Duration = Duration::from_secs(300);
/// Then a caller connects anew, and shows anew who he is; what he has going goes on.
const CONNECTION: Duration = Duration::from_secs(3600);
/// For calls to be told that they are over, and for what is written to callers then.
const FLUSH: Duration = Duration::from_secs(1);

/// What a shim lets its callers have.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub per_user: PerUser,
    pub rates: Rates,
    /// Slots that may be on order at a time.
    pub on_demand: usize,
    /// How long runs may go on once the shim is told to stop.
    pub stop: Duration,
}

/// What a shim serves with.
pub struct Parts {
    pub view: View,
    /// `None` with the embedded engine, whose pools are as they were started.
    pub nomad: Option<Nomad>,
    pub vault: Arc<Vault>,
    pub access: Access,
    /// `None` takes no tokens.
    pub tokens: Option<Tokens>,
    pub limits: Limits,
}

/// Serves callers until `stop`, then lets runs end within a time; callers of those that do not
/// are told to attach to them elsewhere.
///
/// # Errors
/// Whatever keeps it from serving.
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
        tokens,
        limits,
    } = parts;
    let (runs, hand_over) = (TaskTracker::new(), CancellationToken::new());
    let api = Api {
        view,
        on_demand: OnDemand::new(nomad.clone(), limits.on_demand),
        nomad,
        vault: vault.clone(),
        access,
        queue: Queue::new(limits.per_user),
        user_rate: Rate::new("user", limits.rates.user),
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
    // After all of them: a browser can send what looks like gRPC as well.
    let guarded = middleware::from_fn(http::no_browser);
    let tokens = tokens.map(Arc::new);
    let door = Door {
        tokens: tokens.clone(),
        rate: Rate::new("caller", limits.rates.caller).into(),
    };
    let identified = middleware::from_fn_with_state(door, identify);
    let routes = routes.into_axum_router().layer(identified).layer(guarded);
    let routes = Routes::from(routes);
    let server = Server::builder()
        .accept_http1(true)
        .http2_keepalive_interval(Some(PING))
        .http2_keepalive_timeout(Some(GONE))
        .max_connection_age(CONNECTION)
        .add_routes(routes);

    let stopped = stop.clone().cancelled_owned();
    let serving = server.serve_with_incoming_shutdown(incoming::incoming(listeners), stopped);
    let overrun = async {
        stop.cancelled().await;
        runs.close();
        if timeout(limits.stop, runs.wait()).await.is_err() {
            tracing::info!(runs = runs.len(), "handing over what goes on");
            hand_over.cancel();
            let _left = timeout(FLUSH, runs.wait()).await;
        }
        // The last events are on their way.
        sleep(FLUSH).await;
    };
    tokio::select! {
        served = serving => served?,
        () = overrun => {}
        () = vault.keep() => unreachable!("it never ends"),
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
