//! Ends the runs that are left on a node when the deadline of its drain has passed. The driver
//! cannot see the deadline. Every shim does this; a second cancel has no effect.

use std::{collections::BTreeSet, time::Duration};

use futures_util::future::join_all;
use polydev_proto::node::{CancelRunRequest, node_service_client::NodeServiceClient};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::View;

const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Time between two tries to end the runs of a node.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// The reason that the runs' callers get.
const REASON: &str = "its node was drained, and the drain's deadline has passed";

/// Cancels each run on a drained node. Ends when `drained` does.
pub async fn end_runs(view: View, mut drained: watch::Receiver<BTreeSet<String>>) {
    loop {
        let nodes = drained.borrow_and_update().clone();
        let left = nodes.iter().flat_map(|node_id| view.stopped_runs(node_id));
        let asked = left.map(async |(channel, run_id)| {
            let request = CancelRunRequest {
                run_id: run_id.into(),
                user_id: String::new(),
                reason: REASON.into(),
            };
            let mut client = NodeServiceClient::new(channel);
            match timeout(ANSWER_TIMEOUT, client.cancel_run(request)).await {
                Ok(Ok(_)) => tracing::info!(%run_id, "cancelled a run of a drained node"),
                Ok(Err(status)) => tracing::warn!(%run_id, %status, "cannot cancel a run yet"),
                Err(_) => tracing::warn!(%run_id, "cannot cancel a run yet: no answer"),
            }
        });
        join_all(asked).await;
        tokio::select! {
            changed = drained.changed() => if changed.is_err() { return },
            () = sleep(RETRY_INTERVAL), if !nodes.is_empty() => {}
        }
    }
}
