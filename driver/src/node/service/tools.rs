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
use crate::run::Run;

/// A reason is a sentence.
const MAX_REASON: usize = 4096;
/// What a call brings into a conversation is a word.
const MAX_ENTERS: usize = 64;

/// All calls that wait, and then each new one.
pub(super) fn watch(node: Arc<Node>) -> impl Stream<Item = WatchToolCallsResponse> + Send {
    let news = node.runs.watch_tool_calls();
    let waiting = node.runs.waiting_tool_calls();
    stream::unfold(
        (node, news, VecDeque::from(waiting)),
        |(node, mut news, mut waiting)| async move {
            let next = loop {
                if let Some(next) = waiting.pop_front() {
                    break next;
                }
                match news.recv().await {
                    Ok(next) => break next,
                    Err(RecvError::Lagged(_)) => waiting = node.runs.waiting_tool_calls().into(),
                    Err(RecvError::Closed) => return None,
                }
            };
            Some((encode(&next.0, &next.1), (node, news, waiting)))
        },
    )
}

fn encode(run: &Run, call: &ToolCall) -> WatchToolCallsResponse {
    let claimed = &run.claimed;
    WatchToolCallsResponse {
        run_id: claimed.run_id.into(),
        user_id: claimed.user_id.clone().into(),
        provider: claimed.provider.clone(),
        caller: claimed.caller.clone(),
        call: Some(call.clone()),
    }
}

/// # Errors
/// INVALID_ARGUMENT names the field; NOT_FOUND if no such call waits.
pub(super) fn answer(run: &Run, answer: Option<ToolAnswer>) -> Result<(), Status> {
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
    match run.answer_tool_call(answer) {
        true => Ok(()),
        false => Err(Status::not_found(format!(
            "run `{}` has no call {number} that waits",
            run.claimed.run_id
        ))),
    }
}
