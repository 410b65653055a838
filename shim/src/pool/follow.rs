//! Keeps the view up to date: one task for each driver follows its slots.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Duration};

use polydev_proto::node::{WatchSlotsRequest, node_service_client::NodeServiceClient};
use polydev_transport::{address::Address, tls::Trust};
use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{sleep, timeout},
};
use tonic::{Code, Status, transport::Endpoint};

use super::View;
use crate::{
    credentials::{Vault, refreshed},
    engine::{At, Expected},
    tools::{self, Tools},
};
use polydev_transport::backoff::Backoff;

/// Bytes of one run on their way from the driver.
const STREAM_WINDOW: u32 = 1 << 20;
/// Bytes of all runs on their way from one driver. It is so large that a slow reader delays no
/// other run.
const CONNECTION_WINDOW: u32 = 256 << 20;
/// Large enough for a piece of output.
const MAX_FRAME: u32 = 128 << 10;
/// Most bytes of a driver's report: thousands of slots with long lists of what they may reach.
const MAX_SNAPSHOT: usize = 64 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time between two pings, and for the answer to a ping.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// The same if another node's driver answers.
const OTHER_NODE_INTERVAL: Duration = Duration::from_secs(10);
/// Short, because runs wait for their driver to come back.
const MAX_RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// Who hears what drivers report beside their slots.
#[derive(Debug, Clone)]
pub struct Heard {
    /// Takes the credentials that runs refresh.
    pub vault: Arc<Vault>,
    /// Decides about calls of tools.
    pub tools: Tools,
}

/// Follows every driver in `drivers` (by node id) as drivers come and go, with what they report to
/// `heard`. Follows a driver that is no longer listed as
/// long as its connection lasts: the driver still runs when Nomad does not hear from the agent.
/// Ends when `drivers` does.
pub async fn follow(
    view: View,
    mut drivers: watch::Receiver<BTreeMap<String, At>>,
    trust: Option<Trust>,
    heard: Heard,
) {
    let mut followed: BTreeMap<String, (At, AbortHandle)> = BTreeMap::new();
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let wanted = drivers.borrow_and_update().clone();
        followed.retain(|node_id, (at, task)| {
            let now = wanted.get(node_id);
            if now.is_none() {
                view.leave(node_id);
            }
            let has_moved = now.is_some_and(|now| now != at);
            // A machine that was set up again has another id.
            let is_anothers = now.is_none() && wanted.values().any(|other| other == at);
            if has_moved || is_anothers {
                task.abort();
            }
            if task.is_finished() {
                view.disconnect(node_id);
            }
            !task.is_finished()
        });
        for (node_id, at) in wanted {
            view.expect(&node_id);
            followed.entry(node_id.clone()).or_insert_with(|| {
                let driver = Driver {
                    node_id,
                    at: at.clone(),
                    trust: trust.clone(),
                };
                let task = tasks.spawn(follow_driver(view.clone(), driver, heard.clone()));
                (at, task)
            });
        }
        tokio::select! {
            changed = drivers.changed() => if changed.is_err() { return },
            Some(_ended) = tasks.join_next() => {}
        }
    }
}

/// A driver to follow, and how the shim identifies itself to it.
struct Driver {
    node_id: String,
    at: At,
    trust: Option<Trust>,
}

async fn follow_driver(view: View, driver: Driver, heard: Heard) {
    let Driver { node_id, at, .. } = &driver;
    let address = &at.address;
    let mut retry = Backoff::new(RETRY_INTERVAL, MAX_RETRY_INTERVAL);
    let mut last = String::new();
    loop {
        let Err(status) = follow_once(&view, &driver, &heard, &mut retry).await;
        view.disconnect(node_id);
        // Logs each reason only once: a node may be away for a long time.
        let reason = status.message();
        if *reason != *last {
            match status.code() {
                Code::FailedPrecondition => {
                    tracing::warn!(node_id, reason, "a node's driver is not followed");
                }
                _ => tracing::info!(node_id, address, reason, "cannot reach a driver"),
            }
            reason.clone_into(&mut last);
        }
        if view.has_left(node_id) {
            return;
        }
        let wait = match status.code() {
            // Somebody has to change something first; then this node is followed anew.
            Code::FailedPrecondition => OTHER_NODE_INTERVAL,
            _ => retry.next_wait(),
        };
        sleep(wait).await;
    }
}

async fn follow_once(
    view: &View,
    driver: &Driver,
    heard: &Heard,
    retry: &mut Backoff,
) -> Result<Infallible, Status> {
    let Driver { node_id, at, trust } = driver;
    if let Expected::Nobody(reason) = &at.expected {
        return Err(Status::failed_precondition(reason));
    }
    let address: Address = (at.address)
        .parse()
        .map_err(|error| Status::invalid_argument(crate::chain(&error)))?;
    // Each connection between a run and its caller may hold this much of its output: see
    // `docs/reliability.md`.
    let settings = |endpoint: Endpoint| {
        endpoint
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_INTERVAL)
            .keep_alive_while_idle(true)
    };
    let connect = timeout(CONNECT_TIMEOUT, address.connect(trust.as_ref(), settings)).await;
    let channel = connect
        .map_err(|_| Status::deadline_exceeded("no connection in 5 s"))?
        .map_err(|error| Status::unavailable(crate::chain(&*error)))?;
    let client = NodeServiceClient::new(channel.clone());
    let mut client = client.max_decoding_message_size(MAX_SNAPSHOT);
    let watching = timeout(CONNECT_TIMEOUT, client.watch_slots(WatchSlotsRequest {})).await;
    let mut slots = watching
        .map_err(|_| Status::deadline_exceeded("no answer in 5 s"))??
        .into_inner();
    // This wait has no deadline: the driver sends only changes, and the connection breaks when the
    // driver dies or its machine does not answer pings.
    let mut next = async || -> Result<(), Status> {
        let told = slots.message().await?;
        let told = told.ok_or_else(|| Status::unavailable("the driver ended the stream"))?;
        let checked = at.expected.check(&at.address, &told.node_identity);
        checked.map_err(Status::failed_precondition)?;
        retry.reset();
        view.apply(node_id, &channel, told);
        Ok(())
    };
    // Only then is it known to be the node's.
    next().await?;
    let follow_slots = async {
        loop {
            next().await?;
        }
    };
    tokio::select! {
        followed = follow_slots => followed,
        never = refreshed::follow(&heard.vault, node_id, channel.clone()) => match never {},
        never = tools::follow(&heard.tools, node_id, channel.clone()) => match never {},
    }
}
