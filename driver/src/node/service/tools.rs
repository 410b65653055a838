//! Calls of tools on their way to the shims, and the shims' answers.

use std::{collections::VecDeque, sync::Arc};

use futures_util::{Stream, stream};
use polydev_proto::{
    init::{ToolAnswer, ToolCall},
    node::WatchToolCallsResponse,
};
use tokio::sync::broadcast::error::RecvError;
use tonic::Status;

use super::Node;
use crate::run::{Run, book::CallNews};

/// A reason is a sentence.
const MAX_REASON: usize = 4096;
/// What a call brings into a conversation is a word.
const MAX_ENTERS: usize = 64;

/// All calls that wait, and then each new one; with `ends`, also those that wait no longer.
pub(super) fn watch(
    node: Arc<Node>,
    ends: bool,
) -> impl Stream<Item = WatchToolCallsResponse> + Send {
    let news = node.runs.watch_tool_calls();
    let waiting = node.runs.waiting_tool_calls();
    stream::unfold(
        (node, news, VecDeque::from(waiting)),
        move |(node, mut news, mut waiting)| async move {
            let next = loop {
                if let Some((run, call)) = waiting.pop_front() {
                    break encode(&run, &call);
                }
                match news.recv().await {
                    Ok((run, CallNews::Waits(call))) => break encode(&run, &call),
                    Ok((run, CallNews::Ended(number))) if ends => break ended(&run, number),
                    Ok((_, CallNews::Ended(_))) => {}
                    // An end was missed: a new stream has what still waits.
                    Err(RecvError::Lagged(_)) if ends => return None,
                    Err(RecvError::Lagged(_)) => waiting = node.runs.waiting_tool_calls().into(),
                    Err(RecvError::Closed) => return None,
                }
            };
            Some((next, (node, news, waiting)))
        },
    )
}

fn ended(run: &Run, number: u64) -> WatchToolCallsResponse {
    WatchToolCallsResponse {
        run_id: run.claimed.run_id.into(),
        ended: number,
        ..WatchToolCallsResponse::default()
    }
}

fn encode(run: &Run, call: &ToolCall) -> WatchToolCallsResponse {
    let claimed = &run.claimed;
    WatchToolCallsResponse {
        ended: 0,
        run_id: claimed.run_id.into(),
        user_id: claimed.user_id.clone().into(),
        provider: claimed.provider.clone(),
        caller: claimed.caller.clone(),
        caller_user: claimed.caller_user.clone(),
        call: Some(call.clone()),
    }
}

/// # Errors
/// INVALID_ARGUMENT names the field; NOT_FOUND if no such call waits.
pub(super) fn answer(node: &Node, run: &Run, answer: Option<ToolAnswer>) -> Result<(), Status> {
    let answer = answer.ok_or_else(|| Status::invalid_argument("`answer` is missing"))?;
    for (field, text, most) in [
        ("answer.reason", &answer.reason, MAX_REASON),
        ("answer.enters", &answer.enters, MAX_ENTERS),
    ] {
        if text.len() > most {
            let problem = format!(
                "`{field}` has {} bytes; at most {most} are allowed",
                text.len()
            );
            return Err(Status::invalid_argument(problem));
        }
    }
    let number = answer.number;
    match node.runs.answer_tool_call(run, answer) {
        true => Ok(()),
        false => Err(Status::not_found(format!(
            "run `{}` has no call {number} that waits",
            run.claimed.run_id
        ))),
    }
}
