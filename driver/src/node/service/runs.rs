//! Lists and watches runs, without their output, and sends the accounts that they refresh.

use std::{collections::VecDeque, sync::Arc};

use futures_util::{Stream, stream};
use polydev_proto::{
    id::{RunId, UserId},
    node::{self, ListRunsRequest, WatchRefreshedResponse, WatchRunsRequest, WatchRunsResponse},
};
use prost_types::Timestamp;
use tokio::sync::broadcast::error::RecvError;
use tonic::Status;

use super::{duration, encode_ended, given};
use crate::{
    node::Node,
    run::{
        Run,
        book::NotFound,
        listing::{Filter, State, Summary},
    },
};

/// Most runs in one response, of some 300 bytes each.
const MAX_LIMIT: u32 = 2000;

/// # Errors
/// INVALID_ARGUMENT
pub(super) fn decode(request: ListRunsRequest) -> Result<(Filter, usize), Status> {
    let ListRunsRequest {
        user_id,
        provider,
        states,
        before_run_id,
        limit,
    } = request;
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(Status::invalid_argument(format!(
            "`limit` is {limit}; must be 1 to {MAX_LIMIT}"
        )));
    }
    let state = |state: i32| match node::run::State::try_from(state) {
        Ok(node::run::State::Claimed) => Ok(State::Claimed),
        Ok(node::run::State::Running) => Ok(State::Running),
        Ok(node::run::State::Ended) => Ok(State::Ended),
        Ok(node::run::State::Unspecified) | Err(_) => Err(Status::invalid_argument(format!(
            "`states` contains {state}, which is not a valid state"
        ))),
    };
    let before = given(before_run_id).map(|before| {
        let refused = |_| {
            let problem = format!("`before_run_id` is `{before}`, which is not a UUIDv7");
            Status::invalid_argument(problem)
        };
        before.parse().map_err(refused)
    });
    let filter = Filter {
        user_id: given(user_id).map(UserId::from),
        provider: given(provider),
        states: states.into_iter().map(state).collect::<Result<_, _>>()?,
        before: before.transpose()?,
    };
    Ok((filter, usize::try_from(limit).unwrap_or(usize::MAX)))
}

/// All matching runs, and then each one whose progress changes.
pub(super) fn watch(
    node: Arc<Node>,
    request: WatchRunsRequest,
) -> impl Stream<Item = WatchRunsResponse> + Send {
    let filter = Filter {
        user_id: given(request.user_id).map(UserId::from),
        provider: given(request.provider),
        ..Filter::default()
    };
    let steps = node.runs.steps();
    stream::unfold(
        (node, filter, steps, true),
        |(node, filter, mut steps, mut all)| async move {
            let told = loop {
                if all {
                    let runs = node.runs.list(&filter, usize::MAX);
                    break WatchRunsResponse {
                        runs: runs.into_iter().map(encode).collect(),
                        snapshot: true,
                        ..WatchRunsResponse::default()
                    };
                }
                match steps.recv().await {
                    Ok(run_id) => match step(&node, &filter, run_id) {
                        Some(told) => break told,
                        None => continue,
                    },
                    Err(RecvError::Lagged(_)) => all = true,
                    Err(RecvError::Closed) => return None,
                }
            };
            Some((told, (node, filter, steps, false)))
        },
    )
}

/// The change to report for a run.
fn step(node: &Node, filter: &Filter, run_id: RunId) -> Option<WatchRunsResponse> {
    let mut told = WatchRunsResponse::default();
    match node.runs.find(run_id, None) {
        Ok(run) if filter.fits(&run.claimed) => told.runs.push(encode(Run::summary(run)?)),
        // A watcher that never saw the run does not know the id, and ignores it; others
        // have already seen the run's end.
        Err(NotFound::Aborted { .. } | NotFound::Released { .. }) => {
            told.forgotten_run_ids.push(run_id.into());
        }
        Ok(_) | Err(_) => return None,
    }
    Some(told)
}

/// All refreshed accounts that are still kept, and then each new one.
pub(super) fn watch_refreshed(
    node: Arc<Node>,
) -> impl Stream<Item = WatchRefreshedResponse> + Send {
    let news = node.runs.watch_refreshed();
    let kept = node.runs.all_refreshed();
    stream::unfold(
        (node, news, VecDeque::from(kept)),
        |(node, mut news, mut runs)| async move {
            let told = loop {
                if let Some(run) = runs.pop_front() {
                    match run.refreshed() {
                        Some(refreshed) => break (run.claimed.run_id, refreshed),
                        None => continue,
                    }
                }
                match news.recv().await {
                    Ok(run_id) => runs.extend(node.runs.find(run_id, None)),
                    Err(RecvError::Lagged(_)) => runs = node.runs.all_refreshed().into(),
                    Err(RecvError::Closed) => return None,
                }
            };
            let (run_id, refreshed) = told;
            let told = WatchRefreshedResponse {
                run_id: run_id.into(),
                refreshed: Some(refreshed),
            };
            Some((told, (node, news, runs)))
        },
    )
}

/// With what is too much for a list.
pub(super) fn encode_whole(summary: Summary) -> node::Run {
    let egress = summary.answers.egress.clone();
    node::Run {
        egress,
        ..encode(summary)
    }
}

pub(super) fn encode(summary: Summary) -> node::Run {
    let claimed = &summary.run.claimed;
    let state = match summary.state {
        State::Claimed => node::run::State::Claimed,
        State::Running => node::run::State::Running,
        State::Ended => node::run::State::Ended,
    };
    node::Run {
        run_id: claimed.run_id.into(),
        user_id: claimed.user_id.clone().into(),
        provider: claimed.provider.clone(),
        slot_id: claimed.slot_id.clone().into(),
        generation: claimed.generation.0,
        on_demand: claimed.on_demand,
        state: state.into(),
        claimed_at: Some(Timestamp::from(claimed.claimed_at)),
        started_after: summary.started.and_then(duration),
        ended: summary.ended.map(encode_ended),
        stdout_bytes: summary.stdout_bytes,
        stderr_bytes: summary.stderr_bytes,
        cancelled: summary.cancelled,
        usage: summary.answers.usage.clone(),
        api_errors: summary.answers.errors.clone(),
        egress: Vec::new(),
    }
}
