//! The images of all nodes that are polydev's: `ListImages` and `PruneImages`.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use polydev_proto::{
    node::{self, node_service_client::NodeServiceClient},
    runtime::{Image, ListImagesResponse, NodeImages, PruneImagesRequest, PruneImagesResponse},
};
use tokio::time::timeout;
use tonic::{Status, transport::Channel};

use super::Api;
use crate::{
    access::{Action, Caller},
    audit::record::{Operation, Record},
    run::{Error, listing::MAX_ASKED},
};

/// Time for one node: its Docker adds up layers, and removes image after image.
const NODE_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// Images of a node, and what their removal frees.
type Found = (Vec<node::Image>, Option<u64>);

impl Api {
    pub(in crate::service) async fn list_images(
        &self,
        caller: &Caller,
    ) -> Result<ListImagesResponse, Error> {
        let record = Record::new(caller, Operation::Look);
        self.check(caller, Action::Look, &record)?;
        let ask = |mut node: NodeServiceClient<Channel>| async move {
            let images = node.list_images(node::ListImagesRequest {}).await?;
            Ok((images.into_inner().images, None))
        };
        let nodes = self.on_nodes(ask).await;
        Ok(ListImagesResponse { nodes })
    }

    pub(in crate::service) async fn prune_images(
        &self,
        caller: &Caller,
        PruneImagesRequest { all, remove }: PruneImagesRequest,
    ) -> Result<PruneImagesResponse, Error> {
        let operation = match remove {
            true => Operation::PruneImages,
            false => Operation::Look,
        };
        let record = Record::new(caller, operation);
        self.permit(caller, Action::Images, &record)?;
        let request = node::PruneImagesRequest { all, remove };
        let ask = |mut node: NodeServiceClient<Channel>| async move {
            let pruned = node.prune_images(request).await?.into_inner();
            Ok((pruned.images, pruned.reclaimed_bytes))
        };
        let nodes = self.on_nodes(ask).await;
        Ok(PruneImagesResponse { nodes })
    }

    /// Asks all nodes at once, so many at a time.
    async fn on_nodes<F>(&self, ask: impl Fn(NodeServiceClient<Channel>) -> F) -> Vec<NodeImages>
    where
        F: Future<Output = Result<Found, Status>>,
    {
        let (reachable, unreachable) = self.view.channels();
        let asked = stream::iter(reachable).map(|(node_id, channel)| {
            let found = timeout(NODE_TIMEOUT, ask(NodeServiceClient::new(channel)));
            async move {
                match found.await {
                    Ok(Ok(found)) => encode(node_id, found),
                    Ok(Err(status)) => silent(node_id, status.message()),
                    Err(_) => silent(node_id, "no answer within five minutes"),
                }
            }
        });
        let mut nodes: Vec<_> = asked.buffer_unordered(MAX_ASKED).collect().await;
        let lost = |node_id| silent(node_id, "no connection to its driver");
        nodes.extend(unreachable.into_iter().map(lost));
        nodes.sort_by(|a, b| a.node_id.cmp(&b.node_id));
        nodes
    }
}

fn silent(node_id: String, reason: &str) -> NodeImages {
    NodeImages {
        node_id,
        reason: reason.to_owned(),
        ..NodeImages::default()
    }
}

fn encode(node_id: String, (images, reclaimed_bytes): Found) -> NodeImages {
    let image = |image: node::Image| Image {
        image_id: image.image_id,
        tags: image.tags,
        size_bytes: image.size_bytes,
        unique_bytes: image.unique_bytes,
        created: image.created,
        in_use: image.in_use,
        fetched: image.fetched,
    };
    NodeImages {
        node_id,
        reachable: true,
        images: images.into_iter().map(image).collect(),
        reclaimed_bytes,
        ..NodeImages::default()
    }
}
