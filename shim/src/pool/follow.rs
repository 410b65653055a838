//! Keeps the view: one task for each driver, which follows its slots.

use std::{collections::BTreeMap, convert::Infallible, time::Duration};

use polydev_proto::node::{WatchSlotsRequest, node_service_client::NodeServiceClient};
use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{sleep, timeout},
};
use tonic::{Status, transport::Endpoint};

use super::View;

/// Bytes of one run on their way from the driver.
const STREAM_WINDOW: u32 = 1 << 20;
/// Bytes of all runs on their way from one driver: one that is read slowly stops no other.
const CONNECTION_WINDOW: u32 = 256 << 20;
/// A piece of output fits.
const FRAME: u32 = 128 << 10;
const CONNECT: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(50);
/// Runs wait for their driver to come back.
const RETRY_MOST: Duration = Duration::from_millis(250);

/// Follows every driver that `drivers` names, node id to address, as they come and
/// go. Ends when `drivers` does.
pub async fn follow(view: View, mut drivers: watch::Receiver<BTreeMap<String, String>>) {
    let mut followed: BTreeMap<String, (String, AbortHandle)> = BTreeMap::new();
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let wanted = drivers.borrow_and_update().clone();
        followed.retain(|node_id, (address, task)| {
            let keep = wanted.get(node_id) == Some(address);
            if !keep {
                task.abort();
                view.leave(node_id);
            }
            keep
        });
        for (node_id, address) in wanted {
            followed.entry(node_id.clone()).or_insert_with(|| {
                view.expect(&node_id);
                let task = tasks.spawn(follow_driver(view.clone(), node_id, address.clone()));
                (address, task)
            });
        }
        tokio::select! {
            changed = drivers.changed() => if changed.is_err() { return },
            Some(_aborted) = tasks.join_next() => {}
        }
    }
}

async fn follow_driver(view: View, node_id: String, address: String) {
    let mut retry = RETRY;
    loop {
        let Err(status) = follow_once(&view, &node_id, &address, &mut retry).await;
        view.disconnect(&node_id);
        tracing::debug!(node_id, address, %status, "a driver is out of reach");
        sleep(retry.mul_f64(rand::random_range(0.5..1.0))).await;
        retry = RETRY_MOST.min(retry * 2);
    }
}

async fn follow_once(
    view: &View,
    node_id: &str,
    address: &str,
    retry: &mut Duration,
) -> Result<Infallible, Status> {
    // Each connection on the way of a run holds so much of its output: see `docs/reliability.md`.
    let endpoint = Endpoint::from_shared(address.to_owned())
        .map_err(|error| Status::invalid_argument(crate::chain(&error)))?
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME);
    let connect = timeout(CONNECT, endpoint.connect()).await;
    let channel = connect
        .map_err(|_| Status::deadline_exceeded("no connection in 5 s"))?
        .map_err(|error| Status::unavailable(crate::chain(&error)))?;
    let mut client = NodeServiceClient::new(channel.clone());
    let watching = timeout(CONNECT, client.watch_slots(WatchSlotsRequest {})).await;
    let mut slots = watching
        .map_err(|_| Status::deadline_exceeded("no answer in 5 s"))??
        .into_inner();
    // Silence is no sign of death here: the driver speaks when something changes, and
    // the connection breaks when it dies.
    while let Some(told) = slots.message().await? {
        *retry = RETRY;
        view.apply(node_id, &channel, told);
    }
    Err(Status::unavailable("the driver ended the stream"))
}
