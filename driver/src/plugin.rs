//! What every go-plugin host expects of a plugin: the handshake, the base services, and an
//! orderly start and stop.

mod base;
mod controller;
pub mod handshake;

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt, net::UnixStream, process::parent_id},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use futures_util::StreamExt;
use polydev_proto::{
    base::base_plugin_server::BasePluginServer, driver::driver_server::DriverServer,
    goplugin::grpc_controller_server::GrpcControllerServer,
};
use polydev_transport::accept::accept;
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use tonic::transport::Server;

use crate::{events::Events, fingerprint::Health, node::Node, service::Service};

/// Task configurations and exec input may be large; the host has no limit.
const MAX_MESSAGE: usize = 64 << 20;
/// The go-plugin host kills a plugin two seconds after it asks the plugin to stop.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(1500);
/// References to [`Service::attached`] when no agent is connected: the service's and this
/// module's.
const ALONE: usize = 2;
/// Prefix of the folder that each plugin process makes for its socket.
const FOLDER: &str = "polydev-plugin-";

/// Serves one host until the host calls `Shutdown` or SIGTERM arrives. The handshake goes
/// to `stdout`, which belongs to the host.
///
/// # Errors
/// Any reason why the plugin cannot listen.
pub async fn serve(mut stdout: impl io::Write) -> anyhow::Result<()> {
    // Ctrl-C at an agent in the foreground also reaches the plugin, but the agent decides
    // when the plugin stops.
    let mut interrupts = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let host = parent_id();
    let mut successors = signal(SignalKind::user_defined2()).context("cannot handle SIGUSR2")?;
    let mut terminations = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;

    sweep();
    let folder = tempfile::Builder::new()
        .prefix(FOLDER)
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir();
    let folder = folder.context("cannot make a folder for the plugin's socket")?;
    let socket = folder.path().join("plugin.sock");
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("cannot listen at `{}`", socket.display()))?;

    let (node_sender, node) = watch::channel::<Option<Arc<Node>>>(None);
    let (health_sender, health) = watch::channel(Health::Unconfigured);
    let events = Events::new();
    let (leave, mut left) = mpsc::channel(1);
    let (reporter, health_service) = tonic_health::server::health_reporter();
    reporter
        .set_service_status("plugin", tonic_health::ServingStatus::Serving)
        .await;

    let attached = Arc::new(());
    let driver = Service {
        node: node.clone(),
        health,
        events: events.clone(),
        attached: attached.clone(),
    };
    let base = base::Base::new(events, node_sender, health_sender);
    let server = Server::builder()
        .add_service(health_service)
        .add_service(BasePluginServer::new(base).max_decoding_message_size(MAX_MESSAGE))
        .add_service(DriverServer::new(driver).max_decoding_message_size(MAX_MESSAGE))
        .add_service(GrpcControllerServer::new(controller::Controller { leave }))
        .serve_with_incoming(accept(listener).map(Ok::<_, io::Error>));

    handshake::announce(&mut stdout, &socket).context("cannot write the handshake")?;
    tokio::select! {
        served = server => served.context("the plugin's server ended")?,
        // Streams to the host never end, so do not wait for them.
        _ = left.recv() => {}
        _ = terminations.recv() => {}
        // A second driver wants the node. It gets the node if this driver's agent is gone
        // and no other agent is attached.
        () = async {
            while successors.recv().await.is_some() && (parent_id() == host || Arc::strong_count(&attached) > ALONE) {}
            tracing::info!("leaving the node to another driver");
        } => {}
        () = async { while interrupts.recv().await.is_some() {} } => {}
        () = abandoned(node.clone()) => {}
    }
    let node = node.borrow().clone();
    if let Some(node) = node {
        let left = async { tokio::join!(node.leave(), node.telemetry.finish()) };
        let _overrun = tokio::time::timeout(LEAVE_TIMEOUT, left).await;
    }
    Ok(())
}

/// Ends when the host is gone and this process has no node. An agent that stops may start
/// plugins that it never configures. A plugin with a node outlives its agent, because of
/// the runs.
async fn abandoned(node: watch::Receiver<Option<Arc<Node>>>) {
    let host = parent_id();
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        ticks.tick().await;
        if parent_id() != host && node.borrow().is_none() {
            return;
        }
    }
}

/// Removes the folders of killed plugin processes: their sockets refuse connections.
fn sweep() {
    let entries = fs::read_dir(std::env::temp_dir())
        .into_iter()
        .flatten()
        .flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(FOLDER)) {
        let refused = UnixStream::connect(entry.path().join("plugin.sock"))
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        if refused && let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::debug!(%error, "cannot remove a stale folder");
        }
    }
}
