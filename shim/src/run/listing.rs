//! What the nodes tell of runs, without their output.

use futures_util::{StreamExt, stream};
use polydev_proto::{
    node::{self, GetRunRequest, ListRunsRequest, node_service_client::NodeServiceClient},
    provider::Provider,
};

use super::{
    Error, answered,
    attach::{Name, first_of},
};
use crate::pool::View;

/// Nodes that are asked at a time.
pub const ASKED: usize = 64;

/// Which runs: those that fit all of it.
#[derive(Debug, Default)]
pub struct Filter {
    pub user_id: Option<String>,
    pub provider: Option<Provider>,
    /// Any, if there are none.
    pub states: Vec<node::run::State>,
    /// Those with a lesser id.
    pub before: Option<String>,
}

/// Some of the runs, the last one first.
#[derive(Debug)]
pub struct Page {
    pub runs: Vec<Found>,
    /// There are runs before the last of these.
    pub has_more: bool,
    /// Nodes that could not be asked.
    pub unreachable: Vec<String>,
}

/// A run and where it is.
#[derive(Debug)]
pub struct Found {
    pub node_id: String,
    pub run: node::Run,
}

/// One run, wherever it is.
///
/// # Errors
/// [`Error`]
pub async fn get(view: &View, name: &Name) -> Result<Found, Error> {
    let ask = |node_id, channel| async {
        let request = GetRunRequest {
            run_id: name.run_id.clone(),
            user_id: name.user_id.clone(),
        };
        let mut client = NodeServiceClient::new(channel);
        let answer = answered(client.get_run(request)).await?.into_inner();
        let run = answer.run.unwrap_or_default();
        Ok(Found { node_id, run })
    };
    first_of(view, name, ask).await
}

/// The `most` last runs of all nodes that fit.
///
/// # Errors
/// [`Error::NoNode`], [`Error::Unasked`] if none has answered.
pub async fn list(view: &View, filter: &Filter, most: u32) -> Result<Page, Error> {
    let (nodes, mut unreachable) = view.channels();
    if nodes.is_empty() {
        return Err(Error::NoNode);
    }
    let request = ListRunsRequest {
        user_id: filter.user_id.clone().unwrap_or_default(),
        provider: filter
            .provider
            .map_or_else(String::new, |provider| provider.name().to_owned()),
        states: filter.states.iter().map(|state| (*state).into()).collect(),
        before_run_id: filter.before.clone().unwrap_or_default(),
        // One more says whether there are more.
        limit: most.saturating_add(1),
    };
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let mut answers = stream::iter(nodes)
        .map(|(node_id, channel)| {
            let request = request.clone();
            async move {
                let mut client = NodeServiceClient::new(channel);
                (node_id, answered(client.list_runs(request)).await)
            }
        })
        .buffer_unordered(ASKED);
    let (mut runs, mut has_more, mut answered_any) = (Vec::new(), false, false);
    while let Some((node_id, answer)) = answers.next().await {
        let found = match answer {
            Ok(answer) => {
                answered_any = true;
                answer.into_inner().runs
            }
            Err(status) => {
                tracing::info!(node_id, %status, "a node does not list its runs");
                unreachable.push(node_id);
                continue;
            }
        };
        runs.extend(found.into_iter().map(|run| Found {
            node_id: node_id.clone(),
            run,
        }));
        // No more than a page is kept, however many nodes have answered.
        runs.sort_unstable_by(|a, b| b.run.run_id.cmp(&a.run.run_id));
        has_more |= runs.len() > most;
        runs.truncate(most);
    }
    unreachable.sort_unstable();
    if !answered_any {
        return Err(Error::Unasked { nodes: unreachable });
    }
    Ok(Page {
        runs,
        has_more,
        unreachable,
    })
}
