//! The nodes: the resources of each node, and how much of them is used.

use futures_util::{StreamExt, stream};
use polydev_proto::{
    node::{self, GetNodeRequest, GetNodeResponse, node_service_client::NodeServiceClient},
    runtime::{Amount, GetClusterStatusResponse, Node},
};

use super::Api;
use crate::{
    access::{Action, Caller},
    audit::record::{Operation, Record},
    pool::View,
    run::{Error, answered, listing::MAX_ASKED},
};

impl Api {
    pub(in crate::service) async fn get_cluster_status(
        &self,
        caller: &Caller,
    ) -> Result<GetClusterStatusResponse, Error> {
        let record = Record::new(caller, Operation::Look);
        self.check(caller, Action::Look, &record)?;
        Ok(status(&self.view).await)
    }
}

/// Asks all nodes.
async fn status(view: &View) -> GetClusterStatusResponse {
    let (reachable, unreachable) = view.channels();
    let asked = stream::iter(reachable).map(|(node_id, channel)| async move {
        let mut client = NodeServiceClient::new(channel);
        match answered(client.get_node(GetNodeRequest {})).await {
            Ok(figures) => encode(node_id, figures.into_inner()),
            Err(status) => {
                tracing::info!(node_id, %status, "a node does not answer `GetNode`");
                silent(node_id)
            }
        }
    });
    let mut nodes: Vec<Node> = asked.buffer_unordered(MAX_ASKED).collect().await;
    nodes.extend(unreachable.into_iter().map(silent));
    nodes.sort_by(|a, b| a.node_id.cmp(&b.node_id));
    GetClusterStatusResponse {
        shim_version: env!("CARGO_PKG_VERSION").into(),
        nodes,
    }
}

fn silent(node_id: String) -> Node {
    Node {
        node_id,
        ..Default::default()
    }
}

fn encode(node_id: String, figures: GetNodeResponse) -> Node {
    let amount = |amount: node::Amount| Amount {
        cpu_mhz: amount.cpu_mhz,
        memory_mb: amount.memory_mb,
    };
    Node {
        node_id,
        reachable: true,
        driver_version: figures.version,
        slots: figures.slots,
        idle: figures.idle,
        claimed: figures.claimed,
        runs: figures.runs,
        run: figures.run.map(amount),
        headroom: figures.headroom.map(amount),
        headroom_left: figures.headroom_left.map(amount),
    }
}
