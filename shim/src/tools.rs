//! Decides about the calls of tools that the models of agents want to make, on every node and for
//! every shim's runs: whoever listens may answer.

use std::{convert::Infallible, future::pending, sync::Arc};

use futures_util::TryStreamExt;
use polydev_policy::{agent::Call, rules::AgentFacts};
use polydev_proto::{
    init::{ToolAnswer, ToolCall},
    node::{
        AnswerToolCallRequest, WatchToolCallsRequest, WatchToolCallsResponse,
        node_service_client::NodeServiceClient,
    },
};
use tokio::time::timeout;
use tonic::{Code, Status, transport::Channel};

use crate::{
    audit::{Audit, record::Record},
    listen::{CONNECT_TIMEOUT, listen},
    policy::RunPolicy,
};

/// Answers on their way to one driver.
const MAX_ANSWERS: usize = 32;

/// What decisions about tools need.
#[derive(Debug, Clone)]
pub struct Tools {
    pub policy: Arc<RunPolicy>,
    pub audit: Audit,
}

/// Answers the calls of one node, for as long as the future is polled. A shim without rules answers
/// none: another one may have some.
pub async fn follow(tools: &Tools, node_id: &str, channel: Channel) -> Infallible {
    if !tools.policy.is_on() {
        return pending().await;
    }
    let once = |_| follow_once(tools, node_id, channel.clone());
    listen(node_id, "calls of tools", once).await
}

async fn follow_once(tools: &Tools, node_id: &str, channel: Channel) -> Result<Infallible, Status> {
    let mut client = NodeServiceClient::new(channel);
    let calls = answered(client.watch_tool_calls(WatchToolCallsRequest {})).await?;
    let answers = calls.into_inner().map_ok(|call| {
        let mut client = client.clone();
        async move {
            let answer = AnswerToolCallRequest {
                run_id: call.run_id.clone(),
                answer: Some(tools.answer(node_id, call)),
            };
            match answered(client.answer_tool_call(answer)).await {
                // Another shim was first, or the run is over.
                Err(status) if status.code() == Code::NotFound => Ok(()),
                answered => answered.map(|_| ()),
            }
        }
    });
    answers
        .try_for_each_concurrent(MAX_ANSWERS, |answer| answer)
        .await?;
    Err(Status::unavailable("the driver ended the stream"))
}

/// A driver's answer, or DEADLINE_EXCEEDED.
async fn answered<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let answer = timeout(CONNECT_TIMEOUT, call).await;
    answer.map_err(|_| Status::deadline_exceeded("no answer within 5 s"))?
}

impl Tools {
    /// Decides, and records it. What cannot be recorded is not allowed.
    fn answer(&self, node_id: &str, asked: WatchToolCallsResponse) -> ToolAnswer {
        let WatchToolCallsResponse {
            run_id,
            user_id,
            provider,
            caller,
            call,
        } = asked;
        let ToolCall {
            number,
            name,
            arguments,
            entered,
            reaches,
        } = call.unwrap_or_default();
        let agent = AgentFacts {
            user: user_id,
            provider,
            name,
            arguments: String::from_utf8_lossy(&arguments).into_owned(),
        };
        let decided = self.policy.decide_tool(&Call {
            agent: &agent,
            caller: &caller,
            entered: &entered,
            reaches,
        });
        let no = |reason: String| ToolAnswer {
            number,
            allowed: false,
            reason,
            enters: String::new(),
        };
        let Some((decided, tool, enters)) = decided else {
            return no("the shim has no rules".into());
        };
        let checked = decided.check("call");
        let record = Record::of_agent(&caller, node_id, &tool)
            .user(&agent.user)
            .run(&run_id)
            .provider(&agent.provider)
            .decided(Some(decided));
        let record = match &checked {
            Ok(()) => record,
            Err(refused) => record.denied(&refused.to_string()),
        };
        match (self.audit.record(&record), checked) {
            (Err(error), _) => no(format!("the decision cannot be recorded: {error}")),
            (Ok(()), Err(refused)) => no(refused.to_string()),
            (Ok(()), Ok(())) => ToolAnswer {
                number,
                allowed: true,
                reason: String::new(),
                enters: enters.unwrap_or_default().into(),
            },
        }
    }
}
