//! Ends the runs that are left on a node when the deadline of its drain has come: its driver
//! cannot see that. Every shim does so, and nothing comes of it twice.

use std::{collections::BTreeSet, time::Duration};

use futures_util::future::join_all;
use polydev_proto::node::{CancelRunRequest, node_service_client::NodeServiceClient};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::View;

const ANSWER: Duration = Duration::from_secs(5);
/// A driver that does not answer is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// For the runs' callers.
const REASON: &str = "its node was drained, and the deadline has come";

/// Asks each run on a drained node to end, for ever. Ends when `drained` does.
pub async fn end_runs(view: View, mut drained: watch::Receiver<BTreeSet<String>>) {
    loop {
        let nodes = drained.borrow_and_update().clone();
        let left = nodes.iter().flat_map(|node_id| view.stopped_runs(node_id));
        let asked = left.map(async |(channel, run_id)| {
            let request = CancelRunRequest {
                run_id: run_id.clone(),
                user_id: String::new(),
                reason: REASON.into(),
            };
            let mut client = NodeServiceClient::new(channel);
            match timeout(ANSWER, client.cancel_run(request)).await {
                Ok(Ok(_)) => tracing::info!(run_id, "cancelled, its node is drained"),
                Ok(Err(status)) => tracing::warn!(run_id, %status, "not cancelled yet"),
                Err(_) => tracing::warn!(run_id, "not cancelled yet: no answer"),
            }
        });
        join_all(asked).await;
        tokio::select! {
            changed = drained.changed() => if changed.is_err() { return },
            () = sleep(AGAIN), if !nodes.is_empty() => {}
        }
    }
}
