//! How runs are asked for and told, without their output.

use polydev_proto::node::{self, ListRunsRequest};
use prost_types::Timestamp;
use tonic::Status;

use super::{duration, encode_ended};
use crate::run::listing::{Filter, State, Summary};

/// Runs in one answer; some 300 bytes each.
const LIMIT_MOST: u32 = 2000;

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
    if !(1..=LIMIT_MOST).contains(&limit) {
        return Err(Status::invalid_argument(format!(
            "`limit` is {limit}, allowed is 1 to {LIMIT_MOST}"
        )));
    }
    let state = |state: i32| match node::run::State::try_from(state) {
        Ok(node::run::State::Claimed) => Ok(State::Claimed),
        Ok(node::run::State::Running) => Ok(State::Running),
        Ok(node::run::State::Ended) => Ok(State::Ended),
        Ok(node::run::State::Unspecified) | Err(_) => Err(Status::invalid_argument(format!(
            "`states` has {state}, which is none"
        ))),
    };
    let given = |text: String| (!text.is_empty()).then_some(text);
    let filter = Filter {
        user_id: given(user_id),
        provider: given(provider),
        states: states.into_iter().map(state).collect::<Result<_, _>>()?,
        before: given(before_run_id),
    };
    Ok((filter, usize::try_from(limit).unwrap_or(usize::MAX)))
}

pub(super) fn encode(summary: Summary) -> node::Run {
    let claimed = &summary.run.claimed;
    let [stdout_bytes, stderr_bytes] = summary.written;
    let state = match summary.state {
        State::Claimed => node::run::State::Claimed,
        State::Running => node::run::State::Running,
        State::Ended => node::run::State::Ended,
    };
    node::Run {
        run_id: claimed.run_id.clone(),
        user_id: claimed.user_id.clone(),
        provider: claimed.provider.clone(),
        slot_id: claimed.slot_id.clone(),
        generation: claimed.generation,
        on_demand: claimed.on_demand,
        state: state.into(),
        claimed_at: Some(Timestamp::from(claimed.claimed_at)),
        started_after: summary.started.and_then(duration),
        ended: summary.ended.map(encode_ended),
        stdout_bytes,
        stderr_bytes,
        cancelled: summary.cancelled,
    }
}
