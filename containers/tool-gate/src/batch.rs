//! All calls of one answer: each is decided before the first is executed, so that nothing is half
//! done when one of them is refused.

use polydev_policy::{
    canonical,
    decision::{Decision, Outcome},
    evaluate::{Call, Gate},
    nonces::Nonces,
    provenance::{Graph, NodeId},
    seal::Seal,
    token::{self, Token},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::OffsetDateTime;

use crate::{
    execute::{self, Done},
    payload::ToolCall,
    registry::{NoCall, Registry, Resolved},
    settings::Settings,
};

/// Whom rules see as the caller.
const CALLER: &str = "tool-gate";
/// Why a call that is allowed is not executed in strict mode.
pub const ANOTHER: &str = "another call of the answer is not allowed";

/// What the calls are decided with.
#[derive(Debug)]
pub struct Batch<'a> {
    pub gate: &'a Gate,
    pub registry: &'a Registry,
    pub settings: &'a Settings,
    pub graph: &'a Graph,
    /// What the model had before it answered.
    pub node: &'a NodeId,
    /// What is added to each trace: where the data came from, and what the model planned.
    pub notes: &'a [String],
    /// Whether each call needs a token, whatever the settings say.
    pub is_bound: bool,
}

/// A call, and what was decided about it.
#[derive(Debug)]
pub struct Decided {
    pub call: ToolCall,
    pub found: Result<(Resolved, Decision), NoCall>,
    pub token: Option<Token>,
}

/// What became of a call.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    pub tool: Option<String>,
    pub status: Status,
    pub reason: String,
    /// Missing for a call that is none of a tool here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decision: Option<Decision>,
    /// Missing without a secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seal: Option<Seal>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<Done>,
}

/// Each call has one: their numbers are the total.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Executed,
    /// It was allowed, and its program failed.
    Failed,
    StepUp,
    Blocked,
}

impl From<Outcome> for Status {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Allow => Self::Executed,
            Outcome::StepUp => Self::StepUp,
            Outcome::Block => Self::Blocked,
        }
    }
}

impl Batch<'_> {
    /// Decides about each call, and signs a token for each that is allowed.
    #[must_use]
    pub fn decide(&self, calls: Vec<ToolCall>, now: OffsetDateTime) -> Vec<Decided> {
        calls
            .into_iter()
            .map(|call| self.decide_one(call, now))
            .collect()
    }

    fn decide_one(&self, call: ToolCall, now: OffsetDateTime) -> Decided {
        let resolved = match self.registry.resolve(call.name.as_deref(), &call.arguments) {
            Ok(resolved) => resolved,
            Err(none) => {
                return Decided {
                    call,
                    found: Err(none),
                    token: None,
                };
            }
        };
        let asked = self.asked(&resolved, &call.arguments);
        let mut decision = self.gate.decide(self.graph, &asked);
        decision.evaluation_trace.extend_from_slice(self.notes);
        let mut signed = None;
        if decision.outcome != Outcome::Block {
            match &self.settings.secrets {
                // A call that waits for approval has none: it would permit what nobody approved.
                Some(secrets) if decision.outcome == Outcome::Allow => {
                    let (contract, ttl) =
                        (self.settings.require_contract, self.settings.ttl_seconds);
                    signed = Some(Token::issue(
                        &decision,
                        &asked,
                        contract,
                        secrets,
                        &token::nonce(),
                        ttl,
                        now,
                    ));
                }
                None if self.needs_token() => {
                    block(
                        &mut decision,
                        "Fail-closed: execution token secret missing".into(),
                    );
                }
                _ => {}
            }
        }
        Decided {
            call,
            found: Ok((resolved, decision)),
            token: signed,
        }
    }

    /// Uses the tokens up and executes what is allowed. With `is_strict`, nothing is executed
    /// unless everything is allowed.
    #[must_use]
    pub fn execute(
        &self,
        mut calls: Vec<Decided>,
        nonces: &mut Nonces,
        is_strict: bool,
        now: OffsetDateTime,
    ) -> Vec<Entry> {
        let refuse_rest = |calls: &mut [Decided]| {
            if is_strict && !calls.iter().all(|call| call.outcome() == Outcome::Allow) {
                let mut allowed: Vec<_> = calls.iter_mut().filter_map(Decided::allowed).collect();
                for decision in &mut allowed {
                    block(decision, ANOTHER.into());
                }
            }
        };
        // Before a token is used up.
        refuse_rest(&mut calls);
        for decided in &mut calls {
            self.redeem(decided, nonces, now);
        }
        refuse_rest(&mut calls);
        calls
            .into_iter()
            .map(|call| call.carry_out(self.settings))
            .collect()
    }

    fn redeem(&self, decided: &mut Decided, nonces: &mut Nonces, now: OffsetDateTime) {
        let Ok((resolved, decision)) = &mut decided.found else {
            return;
        };
        if decision.outcome != Outcome::Allow || !self.needs_token() {
            return;
        }
        let Some(token) = &decided.token else {
            return block(decision, "Execution token required but missing".into());
        };
        let asked = self.asked(resolved, &decided.call.arguments);
        let contract = self.settings.require_contract;
        let mut own = Nonces::in_memory();
        let nonces = if self.settings.one_time {
            nonces
        } else {
            &mut own
        };
        let redeemed = match &self.settings.secrets {
            Some(secrets) => token.redeem(decision, &asked, contract, secrets, nonces, now),
            None => {
                return block(
                    decision,
                    "Fail-closed: execution token secret missing".into(),
                );
            }
        };
        match redeemed {
            Ok(()) => decision
                .evaluation_trace
                .push("execution_token_consumed".into()),
            Err(why) => block(decision, format!("Execution token invalid: {why}")),
        }
    }

    /// What a policy is asked about a call.
    pub fn asked<'a>(&'a self, resolved: &'a Resolved, arguments: &'a Value) -> Call<'a> {
        Call {
            caller: CALLER,
            tool: &resolved.tool,
            action: &resolved.action,
            target: &resolved.target,
            arguments,
            node: self.node,
        }
    }

    fn needs_token(&self) -> bool {
        self.is_bound || self.settings.require_token || self.settings.require_contract
    }
}

impl Decided {
    /// Without an approval a call of no tool is blocked.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        let decision = self.found.as_ref().map(|(_, decision)| decision.outcome);
        decision.unwrap_or(Outcome::Block)
    }

    fn allowed(&mut self) -> Option<&mut Decision> {
        let (_, decision) = self.found.as_mut().ok()?;
        (decision.outcome == Outcome::Allow).then_some(decision)
    }

    fn carry_out(self, settings: &Settings) -> Entry {
        let Self {
            call,
            found,
            token: _,
        } = self;
        let (status, reason, decision, result) = match found {
            Err(none) => (Status::Blocked, none.to_string(), None, None),
            Ok((resolved, decision)) => match decision.outcome {
                Outcome::Block => (
                    Status::Blocked,
                    decision.reason.clone(),
                    Some(decision),
                    None,
                ),
                Outcome::StepUp => (
                    Status::StepUp,
                    decision.reason.clone(),
                    Some(decision),
                    None,
                ),
                Outcome::Allow => {
                    // What was decided about is what is passed on.
                    let stdin = canonical::text(&call.arguments);
                    let done = execute::execute(&resolved, &stdin);
                    let status = if done.is_success() {
                        Status::Executed
                    } else {
                        Status::Failed
                    };
                    (status, decision.reason.clone(), Some(decision), Some(done))
                }
            },
        };
        let sealed = decision.as_ref().zip(settings.secrets.as_ref());
        Entry {
            id: call.id,
            tool: call.name,
            status,
            reason,
            seal: sealed.map(|(decision, secrets)| Seal::of(decision, secrets)),
            decision,
            result,
        }
    }
}

fn block(decision: &mut Decision, reason: String) {
    decision.outcome = Outcome::Block;
    decision.evaluation_trace.push(format!("{reason} → BLOCK"));
    decision.reason = reason;
}
