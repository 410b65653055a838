//! The calls that report on runs: `GetRun`, `ListRuns` and `WatchRuns`.

use std::time::{Duration, SystemTime};

use futures_util::{Stream, StreamExt};
use polydev_proto::{
    node,
    runtime::{
        GetRunRequest, GetRunResponse, ListRunsRequest, ListRunsResponse, Run, RunState,
        WatchRunsRequest, WatchRunsResponse,
    },
};
use prost_types::Timestamp;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{Api, page};
use crate::{
    access::Caller,
    audit::record::Operation,
    run::{
        Error,
        attach::Name,
        listing::{self, Filter, Found},
        relay::{encode_destinations, encode_end, encode_errors, encode_usage},
        request::{Invalid, parse_user},
        watching::{self, Change},
    },
};

/// How many changes may wait for their caller. Each contains some runs.
const MAX_CHANGES: usize = 16;

impl Api {
    pub(in crate::service) async fn get_run(
        &self,
        caller: &Caller,
        GetRunRequest { run_id, user_id }: GetRunRequest,
    ) -> Result<GetRunResponse, Error> {
        let name = Name::parse(&run_id, user_id)?;
        self.check_run(caller, &name, Operation::See).await?;
        let found = listing::get(&self.view, &name).await?;
        Ok(GetRunResponse {
            run: Some(encode(found)),
        })
    }

    pub(in crate::service) async fn list_runs(
        &self,
        caller: &Caller,
        request: ListRunsRequest,
    ) -> Result<ListRunsResponse, Error> {
        self.check_runs(caller, &request.user_id, &request.provider)?;
        let (filter, most) = parse(request)?;
        let page = listing::list(&self.view, &filter, most).await?;
        let last = page.runs.last().filter(|_| page.has_more);
        Ok(ListRunsResponse {
            next_page_token: last.map_or_else(String::new, |found| found.run.run_id.clone()),
            runs: page.runs.into_iter().map(encode).collect(),
            nodes_unreachable: page.unreachable,
        })
    }

    pub(in crate::service) fn watch_runs(
        &self,
        caller: &Caller,
        request: WatchRunsRequest,
    ) -> Result<impl Stream<Item = WatchRunsResponse> + Send + use<>, Error> {
        let WatchRunsRequest { user_id, provider } = request;
        self.check_runs(caller, &user_id, &provider)?;
        let user_id = given(user_id).map(parse_user).transpose()?;
        let filter = watching::Filter {
            user_id,
            provider: given(provider)
                .map(|name| name.parse())
                .transpose()
                .map_err(Invalid::from)?,
        };
        let (changes, told) = mpsc::channel(MAX_CHANGES);
        let watch = watching::watch(self.view.clone(), filter, changes);
        // The task ends when the caller disconnects or the shim stops.
        tokio::spawn(self.stop.clone().run_until_cancelled_owned(watch));
        let mut nodes_unreachable = Vec::new();
        Ok(ReceiverStream::new(told).map(move |change| {
            let mut told = WatchRunsResponse::default();
            match change {
                Change::Runs { runs, forgotten } => {
                    told.runs = runs.into_iter().map(encode).collect();
                    told.forgotten_run_ids = forgotten;
                }
                Change::Unreachable(nodes) => nodes_unreachable = nodes,
            }
            told.nodes_unreachable.clone_from(&nodes_unreachable);
            told
        }))
    }
}

fn given(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

fn parse(request: ListRunsRequest) -> Result<(Filter, u32), Invalid> {
    let ListRunsRequest {
        user_id,
        provider,
        states,
        page_size,
        page_token,
    } = request;
    let user_id = given(user_id).map(parse_user).transpose()?;
    let state = |state: i32| match RunState::try_from(state) {
        Ok(RunState::Claimed) => Ok(node::run::State::Claimed),
        Ok(RunState::Running) => Ok(node::run::State::Running),
        Ok(RunState::Ended) => Ok(node::run::State::Ended),
        Ok(RunState::Unspecified) | Err(_) => Err(Invalid::Value {
            field: "states",
            given: state.to_string(),
            allowed: "RUN_STATE_CLAIMED, RUN_STATE_RUNNING or RUN_STATE_ENDED",
        }),
    };
    let most = page::size(page_size)?;
    let token = |token: String| token.parse().map_err(|_| page::invalid_token(token));
    let before = given(page_token).map(token).transpose()?;
    let filter = Filter {
        user_id,
        provider: given(provider).map(|name| name.parse()).transpose()?,
        states: states.into_iter().map(state).collect::<Result<_, _>>()?,
        before,
    };
    Ok((filter, most))
}

fn encode(Found { node_id, run }: Found) -> Run {
    let state = match run.state() {
        node::run::State::Unspecified => RunState::Unspecified,
        node::run::State::Claimed => RunState::Claimed,
        node::run::State::Running => RunState::Running,
        node::run::State::Ended => RunState::Ended,
    };
    let claimed_at = run.claimed_at.and_then(|at| SystemTime::try_from(at).ok());
    let after = |after: Option<prost_types::Duration>| {
        let after = Duration::try_from(after?).ok()?;
        claimed_at?.checked_add(after).map(Timestamp::from)
    };
    let warm = !run.on_demand;
    Run {
        state: state.into(),
        node_id,
        warm,
        started_at: after(run.started_after),
        ended_at: after(run.ended.as_ref().and_then(|ended| ended.after)),
        exited: run.ended.map(|ended| encode_end(ended, Vec::new(), warm)),
        run_id: run.run_id,
        user_id: run.user_id,
        provider: run.provider,
        slot_id: run.slot_id,
        generation: run.generation,
        claimed_at: run.claimed_at,
        cancelled: run.cancelled,
        stdout_bytes: run.stdout_bytes,
        stderr_bytes: run.stderr_bytes,
        usage: encode_usage(run.usage),
        api_errors: encode_errors(run.api_errors),
        egress: encode_destinations(run.egress),
    }
}
