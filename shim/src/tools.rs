//! Decides about the calls of tools that the models of agents want to make, on every node and for
//! every shim's runs: whoever listens may answer. A call that needs an approval waits here for it.

use std::{
    collections::{HashMap, hash_map::Entry},
    convert::Infallible,
    future::pending,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use polydev_policy::{agent::Call, rules::AgentFacts};
use polydev_proto::{
    init::{ToolAnswer, ToolCall},
    node::{
        AnswerToolCallRequest, WatchToolCallsRequest, WatchToolCallsResponse,
        node_service_client::NodeServiceClient,
    },
};
use polydev_transport::backoff::Backoff;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Channel};

use crate::{
    approval::{
        Approvals, Waiting,
        wanted::{self, Subject, Wanted, Who},
    },
    audit::{Audit, record::Record},
    listen::{CONNECT_TIMEOUT, listen},
    policy::{Leave, RunPolicy},
};

/// Tries of one answer; with the pauses they take some seconds. A call without an answer is not made.
const MAX_TRIES: usize = 5;
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// What decisions about tools need.
#[derive(Debug, Clone)]
pub struct Tools {
    pub policy: Arc<RunPolicy>,
    pub audit: Audit,
    pub approvals: Approvals,
}

/// A call of a run, by its number.
type Name = (String, u64);

/// One node, and its calls that are decided about here.
#[derive(Debug, Clone)]
struct Node {
    tools: Tools,
    node_id: String,
    client: NodeServiceClient<Channel>,
    /// Cancelled when a call ends elsewhere.
    going: Arc<Mutex<HashMap<Name, CancellationToken>>>,
}

/// Answers the calls of one node, for as long as the future is polled. A shim without rules answers
/// none: another one may have some.
pub async fn follow(tools: &Tools, node_id: &str, channel: Channel) -> Infallible {
    if !tools.policy.is_on() {
        return pending().await;
    }
    let node = Node {
        tools: tools.clone(),
        node_id: node_id.into(),
        client: NodeServiceClient::new(channel),
        going: Arc::default(),
    };
    // With the connection everything ends that waits for an approval: the driver will repeat it. A
    // stream that breaks ends nothing.
    let all = CancellationToken::new();
    let _ends = all.clone().drop_guard();
    listen(node_id, "calls of tools", |_| node.follow_once(&all)).await
}

impl Node {
    async fn follow_once(&self, all: &CancellationToken) -> Result<Infallible, Status> {
        let request = WatchToolCallsRequest { ends: true };
        let mut client = self.client.clone();
        let mut calls = answered(client.watch_tool_calls(request))
            .await?
            .into_inner();
        loop {
            let ended = || Status::unavailable("the driver ended the stream");
            let told = calls.message().await?.ok_or_else(ended)?;
            let Some(call) = &told.call else {
                // Whoever approves or denies it comes too late.
                let name = (told.run_id, told.ended);
                if let Some(over) = self.going.lock().remove(&name) {
                    over.cancel();
                }
                continue;
            };
            let name = (told.run_id.clone(), call.number);
            // The driver may say it more than once.
            if let Entry::Vacant(place) = self.going.lock().entry(name.clone()) {
                let over = place.insert(all.child_token()).clone();
                let node = self.clone();
                tokio::spawn(async move {
                    over.run_until_cancelled(node.answer(told)).await;
                    node.going.lock().remove(&name);
                });
            }
        }
    }

    /// Decides about a call and answers it, once somebody has approved it if that is necessary.
    async fn answer(&self, call: WatchToolCallsResponse) {
        let run_id = call.run_id.clone();
        let number = call.call.as_ref().map_or(0, |call| call.number);
        let decided = match self.tools.decide(&self.node_id, call) {
            Decision::Now(decided) => decided,
            Decision::Waits(waiting, enters) => {
                let seconds = waiting.left().as_secs();
                let wait = ToolAnswer {
                    number,
                    reason: waiting.approval.reason().into(),
                    // 0 would be an answer.
                    wait_seconds: seconds.try_into().unwrap_or(u32::MAX).max(1),
                    ..ToolAnswer::default()
                };
                if !self.tell(&run_id, wait).await {
                    return;
                }
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
        self.tell(&run_id, answer).await;
    }

    /// Tells the driver. False if the call waits no longer, because another shim was first or the run is
    /// over, or if the driver does not answer.
    async fn tell(&self, run_id: &str, answer: ToolAnswer) -> bool {
        let mut retry = Backoff::new(RETRY_INTERVAL, MAX_RETRY_INTERVAL);
        let mut client = self.client.clone();
        for _ in 0..MAX_TRIES {
            let answer = AnswerToolCallRequest {
                run_id: run_id.into(),
                answer: Some(answer.clone()),
            };
            match answered(client.answer_tool_call(answer)).await {
                Ok(_) => return true,
                Err(status) if status.code() == Code::NotFound => return false,
                Err(status) => {
                    tracing::info!(run_id, %status, "cannot answer a call of a tool yet");
                }
            }
            sleep(retry.next_wait()).await;
        }
        tracing::warn!(run_id, "cannot answer a call of a tool");
        false
    }
}

/// A driver's answer, or DEADLINE_EXCEEDED.
async fn answered<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let answer = timeout(CONNECT_TIMEOUT, call).await;
    answer.map_err(|_| Status::deadline_exceeded("no answer within 5 s"))?
}

/// What was decided about a call.
enum Decision {
    /// Whether it is made, and what its result brings into the conversation, or why not.
    Now(Result<String, String>),
    /// It waits; then its result brings this into the conversation.
    Waits(Box<Waiting>, String),
}

impl Tools {
    /// Decides, and records it. What cannot be recorded is not allowed.
    fn decide(&self, node_id: &str, asked: WatchToolCallsResponse) -> Decision {
        let WatchToolCallsResponse {
            run_id,
            user_id,
            provider,
            caller,
            caller_user,
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
                    who: Who {
                        name: caller,
                        user: Some(caller_user).filter(|user| !user.is_empty()),
                    },
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
