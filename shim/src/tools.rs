//! Decides about the calls of tools that the models of agents want to make, on every node and for
//! every shim's runs: whoever listens may answer. A call that needs an approval waits here for it.

use std::{convert::Infallible, future::pending, sync::Arc};

use futures_util::{StreamExt, stream::FuturesUnordered};
use polydev_policy::{agent::Call, rules::AgentFacts};
use polydev_proto::{
    init::{ToolAnswer, ToolCall},
    node::{
        AnswerToolCallRequest, WatchToolCallsRequest, WatchToolCallsResponse,
        node_service_client::NodeServiceClient,
    },
};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Channel};

use crate::{
    access,
    approval::{
        self, Approvals, Waiting,
        wanted::{self, Subject, Wanted},
    },
    audit::{Audit, record::Record},
    listen::{CONNECT_TIMEOUT, listen},
    policy::{Leave, RunPolicy},
};

/// Calls of one node that are decided about at a time, or wait for an approval. The driver keeps the
/// others.
const MAX_CALLS: usize = 2 * approval::MAX_WAITING;

/// What decisions about tools need.
#[derive(Debug, Clone)]
pub struct Tools {
    pub policy: Arc<RunPolicy>,
    pub audit: Audit,
    pub approvals: Approvals,
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
    let request = WatchToolCallsRequest { ends: true };
    let mut calls = answered(client.watch_tool_calls(request))
        .await?
        .into_inner();
    let mut answering = FuturesUnordered::new();
    let mut going: Vec<(String, u64, CancellationToken)> = Vec::new();
    loop {
        tokio::select! {
            call = calls.message(), if answering.len() < MAX_CALLS => {
                let ended = || Status::unavailable("the driver ended the stream");
                let call = call?.ok_or_else(ended)?;
                going.retain(|(.., over)| !over.is_cancelled());
                let Some(asked) = &call.call else {
                    // Whoever approves or denies it comes too late.
                    let mut going = going.iter();
                    let is_it = |(run_id, number, _): &&(String, u64, _)| {
                        *run_id == call.run_id && *number == call.ended
                    };
                    if let Some((.., over)) = going.find(is_it) {
                        over.cancel();
                    }
                    continue;
                };
                let over = CancellationToken::new();
                going.push((call.run_id.clone(), asked.number, over.clone()));
                let (client, is_answered) = (client.clone(), over.clone());
                answering.push(async move {
                    let answer = tools.answer(node_id, call, client);
                    let answer = over.run_until_cancelled(answer).await;
                    is_answered.cancel();
                    answer.unwrap_or(Ok(()))
                });
            }
            Some(answer) = answering.next() => answer?,
        }
    }
}

/// A driver's answer, or DEADLINE_EXCEEDED.
async fn answered<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let answer = timeout(CONNECT_TIMEOUT, call).await;
    answer.map_err(|_| Status::deadline_exceeded("no answer within 5 s"))?
}

async fn tell(
    client: &mut NodeServiceClient<Channel>,
    run_id: &str,
    answer: ToolAnswer,
) -> Result<(), Status> {
    let answer = AnswerToolCallRequest {
        run_id: run_id.into(),
        answer: Some(answer),
    };
    match answered(client.answer_tool_call(answer)).await {
        // Another shim was first, or the run is over.
        Err(status) if status.code() == Code::NotFound => Ok(()),
        answered => answered.map(|_| ()),
    }
}

/// What was decided about a call.
enum Decision {
    /// Whether it is made, and what its result brings into the conversation, or why not.
    Now(Result<String, String>),
    /// It waits; then its result brings this into the conversation.
    Waits(Box<Waiting>, String),
}

impl Tools {
    /// Decides about a call and answers it, once somebody has approved it if that is necessary.
    async fn answer(
        &self,
        node_id: &str,
        call: WatchToolCallsResponse,
        mut client: NodeServiceClient<Channel>,
    ) -> Result<(), Status> {
        let run_id = call.run_id.clone();
        let number = call.call.as_ref().map_or(0, |call| call.number);
        let decided = match self.decide(node_id, call) {
            Decision::Now(decided) => decided,
            Decision::Waits(waiting, enters) => {
                let wait = ToolAnswer {
                    number,
                    reason: waiting.approval.wanted.reason().into(),
                    // Not 0, which would be an answer.
                    wait_seconds: waiting
                        .left()
                        .as_secs()
                        .try_into()
                        .unwrap_or(u32::MAX)
                        .max(1),
                    ..ToolAnswer::default()
                };
                tell(&mut client, &run_id, wait).await?;
                let approved = waiting.approved().await;
                approved
                    .map(|_| enters)
                    .map_err(|error| crate::chain(&error))
            }
        };
        let (allowed, enters, reason) = match decided {
            Ok(enters) => (true, enters, String::new()),
            Err(reason) => (false, String::new(), reason),
        };
        let answer = ToolAnswer {
            number,
            allowed,
            reason,
            enters,
            wait_seconds: 0,
        };
        tell(&mut client, &run_id, answer).await
    }

    /// Decides, and records it. What cannot be recorded is not allowed.
    fn decide(&self, node_id: &str, asked: WatchToolCallsResponse) -> Decision {
        let WatchToolCallsResponse {
            run_id,
            user_id,
            provider,
            caller,
            call,
            ended: _,
        } = asked;
        let ToolCall {
            name,
            arguments,
            entered,
            reaches,
            ..
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
        let Some((decided, tool, enters)) = decided else {
            return Decision::Now(Err("the shim has no rules".into()));
        };
        let enters = enters.unwrap_or_default().to_owned();
        let checked = decided.check("call");
        let record = Record::of_agent(&caller, node_id, &tool)
            .user(&agent.user)
            .run(&run_id)
            .provider(&agent.provider)
            .decided(Some(decided));
        let (recorded, decided) = match checked {
            Ok(Leave::Given) => (self.audit.record(&record), Ok(enters)),
            Err(blocked) => {
                let reason = blocked.to_string();
                (self.audit.record(&record.denied(&reason)), Err(reason))
            }
            Ok(Leave::NeedsApproval) => {
                let waiting = self.approvals.ask(Wanted {
                    record,
                    caller_user: access::user_of(&caller).map(str::to_owned),
                    subject: Subject::Call(wanted::Call {
                        node_id: node_id.into(),
                        tool,
                        name: agent.name,
                        arguments: agent.arguments,
                        entered,
                    }),
                });
                return match waiting {
                    Ok(waiting) => Decision::Waits(waiting.into(), enters),
                    Err(error) => Decision::Now(Err(crate::chain(&error))),
                };
            }
        };
        Decision::Now(match recorded {
            Ok(()) => decided,
            Err(error) => Err(format!("the decision cannot be recorded: {error}")),
        })
    }
}
