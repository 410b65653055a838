//! Finds the drivers through Nomad. Ready nodes have the address of their node service in an
//! attribute of the driver.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    time::Duration,
};

use tokio::{sync::watch, time::sleep};

use crate::nomad::{Error, Nomad, node::Node};
use polydev_transport::backoff::Backoff;

const ADDRESS: &str = "driver.polydev.node_address";
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// Pause between two queries: a busy cluster changes its nodes all the time.
const MIN_INTERVAL: Duration = Duration::from_millis(250);

/// What Nomad reports about its nodes.
#[derive(Debug, Clone, Default)]
pub struct Cluster {
    /// Node id to address.
    pub drivers: watch::Sender<BTreeMap<String, String>>,
    /// Ids of nodes that are drained, or whose drain has passed its deadline.
    pub drained: watch::Sender<BTreeSet<String>>,
}

/// Publishes changes, and never ends. While Nomad cannot be reached or has no leader, the last
/// published state stays.
pub async fn discover(nomad: Nomad, cluster: Cluster) {
    // The index is kept after errors: a server that still reads its log answers when it has reached
    // the index, or after a minute.
    let mut index = 0;
    let mut retry = Backoff::new(RETRY_INTERVAL, MAX_RETRY_INTERVAL);
    loop {
        let Err(error) = discover_once(&nomad, &cluster, &mut index, &mut retry).await;
        tracing::warn!(error = %crate::chain(&error), "cannot list nodes");
        sleep(retry.next_wait()).await;
    }
}

async fn discover_once(
    nomad: &Nomad,
    cluster: &Cluster,
    index: &mut u64,
    retry: &mut Backoff,
) -> Result<Infallible, Error> {
    loop {
        let (next, nodes) = nomad.nodes(*index).await?;
        *index = next;
        retry.reset();
        let drained = nodes.iter().filter(|node| node.is_drained());
        publish(
            &cluster.drained,
            drained.map(|node| node.id.clone()).collect(),
        );
        publish(
            &cluster.drivers,
            nodes.into_iter().filter_map(address).collect(),
        );
        sleep(MIN_INTERVAL).await;
    }
}

fn publish<T: PartialEq>(to: &watch::Sender<T>, found: T) {
    to.send_if_modified(|known| {
        let changed = *known != found;
        *known = found;
        changed
    });
}

/// An unhealthy driver is still followed, because its runs and idle slots are there;
/// one that was never healthy has no address yet.
fn address(node: Node) -> Option<(String, String)> {
    let driver = node
        .drivers
        .get("polydev")
        .filter(|_| node.status == "ready")?;
    let address = driver.attributes.as_ref()?.get(ADDRESS)?;
    (!address.is_empty()).then(|| (node.id, address.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ready_nodes_with_an_address_are_followed() {
        let nodes = r#"[
            {"ID": "a", "Status": "ready", "Drivers": {"polydev": {"Healthy": true,
             "Attributes": {"driver.polydev.node_address": "unix:///a"}}}},
            {"ID": "b", "Status": "down", "Drivers": {"polydev": {"Healthy": true,
             "Attributes": {"driver.polydev.node_address": "unix:///b"}}}},
            {"ID": "c", "Status": "ready", "Drivers": {"polydev": {"Healthy": false, "Attributes": null}}},
            {"ID": "d", "Status": "ready", "Drivers": {"docker": {"Healthy": true}}}
        ]"#;
        let nodes: Vec<Node> = serde_json::from_str(nodes).unwrap();
        let found: Vec<_> = nodes.into_iter().filter_map(address).collect();
        assert_eq!(found, [("a".to_owned(), "unix:///a".to_owned())]);
    }

    #[test]
    fn a_node_that_may_be_given_tasks_again_is_not_drained() {
        let node = |eligibility: &str, last: &str| -> Node {
            let node = format!(
                r#"{{"ID": "a", "Status": "ready", "SchedulingEligibility": "{eligibility}",
                "LastDrain": {last}}}"#
            );
            serde_json::from_str(&node).unwrap()
        };
        let drain = |status: &str| format!(r#"{{"Status": "{status}", "StartedAt": "x"}}"#);
        assert!(node("ineligible", &drain("complete")).is_drained());
        assert!(!node("eligible", &drain("complete")).is_drained());
        assert!(!node("ineligible", &drain("draining")).is_drained());
        assert!(!node("ineligible", &drain("canceled")).is_drained());
        assert!(!node("ineligible", "null").is_drained());
    }
}
