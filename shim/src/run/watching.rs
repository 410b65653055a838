//! Follows the runs of all nodes.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use polydev_proto::{
    id::UserId,
    node::{self, WatchRunsRequest, WatchRunsResponse, node_service_client::NodeServiceClient},
    provider::Provider,
};
use tokio::{sync::mpsc, task::JoinSet, time::sleep};
use tonic::{Status, transport::Channel};

use super::{answered, listing::Found};
use crate::pool::View;

/// Which runs to report: those that match all fields.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    pub user_id: Option<UserId>,
    pub provider: Option<Provider>,
}

/// A change to report.
#[derive(Debug)]
pub enum Change {
    Runs {
        runs: Vec<Found>,
        /// Ids of runs that were reported before and that nodes no longer know.
        forgotten: Vec<String>,
    },
    /// All nodes that cannot be reached now.
    Unreachable(Vec<String>),
}

/// Time between two tries to follow a node that ends the stream.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);
/// Bytes of a message with all runs of a node, about 300 bytes each.
const MAX_ANSWER: usize = 64 << 20;
/// A driver lists an ended run for less than this: `RESULTS_TIMEOUT` of the driver.
const LISTED_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// Reports the nodes that cannot be reached, then the active runs, and then each change of a run.
/// Ends when nobody listens.
pub async fn watch(view: View, filter: Filter, changes: mpsc::Sender<Change>) {
    let mut following = JoinSet::new();
    // What was reported about each node's runs; `None` while the node is followed.
    let mut nodes: HashMap<String, Option<Told>> = HashMap::new();
    let mut unreachable = None;
    let mut news = view.changes();
    loop {
        news.mark_unchanged();
        let (connected, away) = view.channels();
        let known: HashSet<&String> = connected.iter().map(|(id, _)| id).chain(&away).collect();
        // Nobody reports the active runs of a node that has left for good.
        let mut forgotten = Vec::new();
        nodes.retain(|node_id, told| match told {
            Some(told) if !known.contains(node_id) => {
                forgotten.extend(told.going());
                false
            }
            _ => true,
        });
        if !forgotten.is_empty() {
            let runs = Vec::new();
            let gone = changes.send(Change::Runs { runs, forgotten }).await;
            if gone.is_err() {
                return;
            }
        }
        for (node_id, channel) in connected {
            let told = nodes
                .entry(node_id.clone())
                .or_insert(Some(Told::default()));
            if let Some(told) = told.take() {
                let (filter, changes) = (filter.clone(), changes.clone());
                let followed = follow(node_id.clone(), channel, told, filter, changes);
                following.spawn(followed.map(|told| (node_id, told)));
            }
        }
        if unreachable.as_ref() != Some(&away) {
            unreachable = Some(away.clone());
            if changes.send(Change::Unreachable(away)).await.is_err() {
                return;
            }
        }
        tokio::select! {
            () = changes.closed() => return,
            changed = news.changed() => if changed.is_err() { return },
            Some(Ok((node_id, told))) = following.join_next() => {
                nodes.insert(node_id, Some(told));
            }
        }
    }
}

/// Follows one node until its driver ends the stream.
async fn follow(
    node_id: String,
    channel: Channel,
    mut told: Told,
    filter: Filter,
    changes: mpsc::Sender<Change>,
) -> Told {
    let followed = async {
        let request = WatchRunsRequest {
            user_id: filter.user_id.map(String::from).unwrap_or_default(),
            provider: filter
                .provider
                .map_or_else(String::new, |provider| provider.name().to_owned()),
        };
        let mut client = NodeServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        let mut answers = answered(client.watch_runs(request)).await?.into_inner();
        while let Some(answer) = answers.message().await? {
            let (runs, forgotten) = told.news(answer);
            if runs.is_empty() && forgotten.is_empty() {
                continue;
            }
            let found = |run| Found {
                node_id: node_id.clone(),
                run,
            };
            let runs = runs.into_iter().map(found).collect();
            if changes
                .send(Change::Runs { runs, forgotten })
                .await
                .is_err()
            {
                break;
            }
        }
        Ok::<_, Status>(())
    };
    if let Err(status) = followed.await {
        tracing::debug!(node_id, %status, "cannot follow a node's runs");
    }
    sleep(RETRY_INTERVAL).await;
    told
}

/// What was reported to the listener about one node's runs.
#[derive(Debug, Default)]
struct Told {
    runs: HashMap<String, Last>,
    /// Whether the node has answered.
    begun: bool,
}

#[derive(Debug, Clone, Copy)]
struct Last {
    state: i32,
    cancelled: bool,
    /// When the run's end was reported.
    ended: Option<Instant>,
}

impl Told {
    /// The runs whose end was not reported.
    fn going(&self) -> impl Iterator<Item = String> {
        let going = self.runs.iter().filter(|(_, last)| last.ended.is_none());
        going.map(|(run_id, _)| run_id.clone())
    }

    /// The new runs and states of an answer, and the forgotten runs.
    fn news(&mut self, answer: WatchRunsResponse) -> (Vec<node::Run>, Vec<String>) {
        let mut forgotten = answer.forgotten_run_ids;
        if answer.snapshot {
            let now: HashSet<&str> = answer.runs.iter().map(|run| &*run.run_id).collect();
            forgotten.extend(self.going().filter(|run_id| !now.contains(&**run_id)));
        }
        let is_news = |run_id: &String| {
            self.runs
                .remove(run_id)
                .is_some_and(|last| last.ended.is_none())
        };
        forgotten.retain(is_news);
        // Runs that ended before anybody listened are not reported.
        let only_going = answer.snapshot && !self.begun;
        self.begun = true;
        let mut news = Vec::new();
        for run in answer.runs {
            let ended = (run.state() == node::run::State::Ended).then(Instant::now);
            let now = Last {
                state: run.state,
                cancelled: run.cancelled,
                ended,
            };
            let last = self.runs.insert(run.run_id.clone(), now);
            let is_told =
                last.is_some_and(|last| (last.state, last.cancelled) == (now.state, now.cancelled));
            let is_past = only_going && ended.is_some();
            if !is_told && !is_past {
                news.push(run);
            }
        }
        let is_listed = |last: &Last| last.ended.is_none_or(|at| at.elapsed() < LISTED_TIMEOUT);
        self.runs.retain(|_, last| is_listed(last));
        (news, forgotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use node::run::State::{self, Claimed, Ended, Running};

    fn answer(snapshot: bool, runs: &[(&str, State)]) -> WatchRunsResponse {
        let run = |(run_id, state): &(&str, State)| node::Run {
            run_id: (*run_id).into(),
            state: (*state).into(),
            ..node::Run::default()
        };
        WatchRunsResponse {
            runs: runs.iter().map(run).collect(),
            forgotten_run_ids: Vec::new(),
            snapshot,
        }
    }

    fn told(told: &mut Told, answer: WatchRunsResponse) -> (Vec<String>, Vec<String>) {
        let (runs, forgotten) = told.news(answer);
        let name = |run: node::Run| format!("{} {}", run.run_id, run.state);
        (runs.into_iter().map(name).collect(), forgotten)
    }

    #[test]
    fn what_went_on_before_is_told_and_what_had_ended_is_not() {
        let mut all = Told::default();
        let first = answer(true, &[("a", Running), ("b", Ended)]);
        assert_eq!(told(&mut all, first), (vec!["a 2".into()], vec![]));
        let step = answer(false, &[("a", Ended), ("c", Claimed)]);
        assert_eq!(
            told(&mut all, step),
            (vec!["a 3".into(), "c 1".into()], vec![])
        );
    }

    #[test]
    fn a_driver_that_comes_back_repeats_nothing_and_misses_nothing() {
        let mut all = Told::default();
        told(&mut all, answer(true, &[("a", Running), ("b", Ended)]));
        told(&mut all, answer(false, &[("c", Claimed), ("d", Running)]));
        let again = answer(
            true,
            &[("a", Ended), ("b", Ended), ("d", Running), ("e", Ended)],
        );
        assert_eq!(
            told(&mut all, again),
            (vec!["a 3".into(), "e 3".into()], vec!["c".into()])
        );
    }

    #[test]
    fn a_claim_that_came_to_nothing_is_forgotten_by_those_who_heard_of_it() {
        let mut all = Told::default();
        told(&mut all, answer(true, &[("a", Claimed)]));
        let aborted = WatchRunsResponse {
            forgotten_run_ids: vec!["a".into(), "unheard".into()],
            ..WatchRunsResponse::default()
        };
        assert_eq!(told(&mut all, aborted), (vec![], vec!["a".into()]));
    }
}
