//! Approvals as callers see them.

use std::time::Duration;

use polydev_policy::rules::RunFacts;
use polydev_proto::runtime::{
    self, ApprovalEgress, ApprovalRun, ApprovalState, ApprovalToolCall, approval,
};
use prost_types::Timestamp;

use crate::{
    approval::{
        Approval, State,
        wanted::{Call, Subject},
    },
    policy::Decided,
};

/// Without everything that is to be approved.
pub(super) fn encode(approval: &Approval) -> runtime::Approval {
    let Approval {
        id,
        state,
        record,
        what: _,
        summary,
        requested_at,
        expires_at,
        decided_by,
        comment,
    } = approval;
    let policy = record.policy.as_deref();
    let hash = |of: fn(&Decided) -> &String| policy.map(of).cloned().unwrap_or_default();
    let state = match state {
        State::Pending => ApprovalState::Pending,
        State::Approved => ApprovalState::Approved,
        State::Denied => ApprovalState::Denied,
        State::Expired => ApprovalState::Expired,
        State::Withdrawn => ApprovalState::Withdrawn,
    };
    runtime::Approval {
        approval_id: id.to_string(),
        state: state.into(),
        caller: record.who.clone(),
        user_id: record.user_id.clone().unwrap_or_default(),
        provider: record.provider.clone().unwrap_or_default(),
        run_id: record.run_id.clone().unwrap_or_default(),
        reason: approval.reason().into(),
        rules: policy
            .map(|decided| decided.rules.clone())
            .unwrap_or_default(),
        policy_hash: hash(|decided| &decided.policy_hash),
        facts_hash: hash(|decided| &decided.facts_hash),
        summary: summary.clone(),
        requested_at: Some(Timestamp::from(*requested_at)),
        expires_at: Some(Timestamp::from(*expires_at)),
        decided_by: decided_by.clone(),
        comment: comment.clone(),
        subject: None,
    }
}

/// With it.
pub(super) fn encode_whole(approval: &Approval, subject: &Subject) -> runtime::Approval {
    runtime::Approval {
        subject: Some(match subject {
            Subject::Run(facts) => approval::Subject::Run(encode_run(facts)),
            Subject::Call(call) => approval::Subject::ToolCall(encode_call(call)),
        }),
        ..encode(approval)
    }
}

fn encode_run(facts: &RunFacts) -> ApprovalRun {
    let RunFacts {
        argv,
        prompt,
        system,
        model,
        tools,
        conversation,
        trusts_files,
        stdin,
        terminal,
        env,
        work_dir,
        files,
        file_bytes,
        timeout_seconds,
        credential,
        egress_listed,
        egress,
        ..
    } = facts.clone();
    ApprovalRun {
        argv,
        prompt,
        system,
        model,
        tools,
        conversation,
        trusts_files,
        stdin,
        terminal,
        env,
        work_dir,
        files,
        file_bytes,
        timeout: Duration::from_secs(timeout_seconds).try_into().ok(),
        credential,
        egress: egress_listed.then_some(ApprovalEgress { allow: egress }),
    }
}

fn encode_call(call: &Call) -> ApprovalToolCall {
    ApprovalToolCall {
        node_id: call.node_id.clone(),
        tool: call.tool.clone(),
        name: call.name.clone(),
        arguments: call.arguments.clone(),
        entered: call.entered.clone(),
    }
}
