//! Lists runs of all nodes, without their output.

use futures_util::{StreamExt, stream};
use polydev_proto::{
    id::{RunId, UserId},
    node::{self, GetRunRequest, ListRunsRequest, node_service_client::NodeServiceClient},
    provider::Provider,
};

use super::{
    Error, answered,
    attach::{Name, first_of},
};
use crate::pool::View;

/// Largest number of nodes that are asked at the same time.
pub const MAX_ASKED: usize = 64;

/// Which runs to list: those that match all fields.
#[derive(Debug, Default)]
pub struct Filter {
    pub user_id: Option<UserId>,
    pub provider: Option<Provider>,
    /// Empty means every state.
    pub states: Vec<node::run::State>,
    /// Only runs with a smaller id.
    pub before: Option<RunId>,
}

/// Some of the runs, newest first.
#[derive(Debug)]
pub struct Page {
    pub runs: Vec<Found>,
    /// Whether there are older runs.
    pub has_more: bool,
    /// Nodes that could not be asked.
    pub unreachable: Vec<String>,
}

/// A run and its node.
#[derive(Debug)]
pub struct Found {
    pub node_id: String,
    pub run: node::Run,
}

/// One run, on whichever node has it.
///
/// # Errors
/// [`Error`]
pub async fn get(view: &View, name: &Name) -> Result<Found, Error> {
    let ask = |node_id, channel| async {
        let request = GetRunRequest {
            run_id: name.run_id.into(),
            user_id: name.user_id.clone().into(),
        };
        let mut client = NodeServiceClient::new(channel);
        let answer = answered(client.get_run(request)).await?.into_inner();
        let run = answer.run.unwrap_or_default();
        Ok(Found { node_id, run })
    };
    first_of(view, name, ask).await
}

/// The newest `most` runs of all nodes that match `filter`.
///
/// # Errors
/// [`Error::NoNode`]; [`Error::Unasked`] if no node has answered.
pub async fn list(view: &View, filter: &Filter, most: u32) -> Result<Page, Error> {
    let (nodes, mut unreachable) = view.channels();
    if nodes.is_empty() {
        return Err(Error::NoNode);
    }
    let request = ListRunsRequest {
        user_id: filter.user_id.clone().map(String::from).unwrap_or_default(),
        provider: filter
            .provider
            .map_or_else(String::new, |provider| provider.name().to_owned()),
        states: filter.states.iter().map(|state| (*state).into()).collect(),
        before_run_id: filter.before.map(String::from).unwrap_or_default(),
        // One more run shows whether there are more.
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
        .buffer_unordered(MAX_ASKED);
    let (mut runs, mut has_more, mut answered_any) = (Vec::new(), false, false);
    while let Some((node_id, answer)) = answers.next().await {
        let found = match answer {
            Ok(answer) => {
                answered_any = true;
                answer.into_inner().runs
            }
            Err(status) => {
                tracing::info!(node_id, %status, "cannot list a node's runs");
                unreachable.push(node_id);
                continue;
            }
        };
        runs.extend(found.into_iter().map(|run| Found {
            node_id: node_id.clone(),
            run,
        }));
        // Keeps at most one page, however many nodes have answered.
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
