//! Finds the drivers through Nomad. Ready nodes have the address of their node service in an
//! attribute of the driver.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    time::Duration,
};

use tokio::{sync::watch, time::sleep};

use super::{At, Expected};
use crate::nomad::{Error, Nomad, node::Node};
use polydev_transport::backoff::Backoff;

const ADDRESS: &str = "driver.polydev.node_address";
const IDENTITY: &str = "driver.polydev.node_identity";
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// Pause between two queries: a busy cluster changes its nodes all the time.
const MIN_INTERVAL: Duration = Duration::from_millis(250);

/// What Nomad reports about its nodes.
#[derive(Debug, Clone, Default)]
pub struct Cluster {
    /// By the ids of their nodes.
    pub drivers: watch::Sender<BTreeMap<String, At>>,
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
        publish(&cluster.drivers, drivers(&nodes));
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

/// Where the drivers are. An unhealthy driver is still followed, because its runs and idle slots
/// are there; one that was never healthy has no address yet.
fn drivers(nodes: &[Node]) -> BTreeMap<String, At> {
    let told = nodes.iter().filter_map(|node| {
        let driver = node
            .drivers
            .get("polydev")
            .filter(|_| node.status == "ready")?;
        let attribute = |name| {
            driver
                .attributes
                .as_ref()?
                .get(name)
                .filter(|it| !it.is_empty())
        };
        Some((node, attribute(ADDRESS)?.clone(), attribute(IDENTITY)))
    });
    let told: Vec<_> = told.collect();
    let expected = |node: &Node, address: &str, identity: Option<&String>| {
        let same = |(other, _, of): &&(&Node, _, _)| other.id != node.id && *of == identity;
        match (identity, told.iter().find(same)) {
            (Some(_), Some((other, ..))) => Expected::Nobody(format!(
                "nodes `{}` and `{}` report the same identity: one was registered again, or a \
                 state folder was copied with the machine's machine-id",
                node.name, other.name
            )),
            (Some(identity), None) => Expected::Node {
                identity: identity.clone(),
                name: node.name.clone(),
            },
            // A driver that is older than this shim.
            (None, _) if address.starts_with("https:") => Expected::Any,
            (None, _) => Expected::Nobody(format!(
                "the driver of node `{}` does not say which node it is, and is at {address}: \
                 upgrade it",
                node.name
            )),
        }
    };
    let at = told.iter().map(|(node, address, identity)| {
        let expected = expected(node, address, *identity);
        let address = address.clone();
        (node.id.clone(), At { address, expected })
    });
    at.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(nodes: &str) -> BTreeMap<String, At> {
        drivers(&serde_json::from_str::<Vec<Node>>(nodes).unwrap())
    }

    #[test]
    fn only_ready_nodes_with_an_address_are_followed() {
        let found = found(
            r#"[
            {"ID": "a", "Name": "one", "Status": "ready", "Drivers": {"polydev": {"Healthy": true,
             "Attributes": {"driver.polydev.node_address": "unix:///a",
                            "driver.polydev.node_identity": "i"}}}},
            {"ID": "b", "Status": "down", "Drivers": {"polydev": {"Healthy": true,
             "Attributes": {"driver.polydev.node_address": "unix:///b"}}}},
            {"ID": "c", "Status": "ready", "Drivers": {"polydev": {"Healthy": false, "Attributes": null}}},
            {"ID": "d", "Status": "ready", "Drivers": {"docker": {"Healthy": true}}}
        ]"#,
        );
        let at = At {
            address: "unix:///a".into(),
            expected: Expected::Node {
                identity: "i".into(),
                name: "one".into(),
            },
        };
        assert_eq!(found, [("a".to_owned(), at)].into());
    }

    #[test]
    fn a_driver_that_cannot_be_told_from_another_is_not_followed() {
        let node = |id: &str, address: &str, identity: &str| {
            format!(
                r#"{{"ID": "{id}", "Name": "client-{id}", "Status": "ready", "Drivers": {{"polydev":
                {{"Attributes": {{"driver.polydev.node_address": "{address}",
                "driver.polydev.node_identity": "{identity}"}}}}}}}}"#
            )
        };
        let all = [
            node("a", "https://a:1", "one"),
            node("b", "https://b:1", "one"),
            node("c", "unix:///c", ""),
            node("d", "https://d:1", ""),
        ];
        let found = found(&format!("[{}]", all.join(",")));
        let why = |id: &str| found[id].expected.check(&found[id].address, "one");
        assert!(why("a").unwrap_err().contains("`client-a` and `client-b`"));
        assert!(why("b").is_err());
        assert!(why("c").unwrap_err().contains("`client-c`"));
        why("d").unwrap();
    }

    #[test]
    fn a_path_that_leads_to_another_nodes_driver_says_what_to_do() {
        let expected = Expected::Node {
            identity: "one".into(),
            name: "client-2".into(),
        };
        expected.check("unix:///x", "one").unwrap();
        let why = expected.check("unix:///x", "two").unwrap_err();
        assert!(
            why.contains("`client-2`") && why.contains("`shims` block"),
            "{why}"
        );
        assert!(expected.check("https://x:1", "").is_err());
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
