//! Converts a driver's events to events for the caller.

use bytes::Buf;
use polydev_proto::{
    broker, init,
    node::{self, ended},
    runtime::{
        ApiError, Artifact, Artifacts, Destination, ExitReason, Exited, LeftOut, ModelUsage,
        Output, Stage, Started, started,
    },
};

pub(super) fn encode_artifacts(found: init::Artifacts) -> Artifacts {
    let file = |file: init::Artifact| Artifact {
        path: file.path,
        mode: file.mode,
        size: file.size,
    };
    let left_out = |left_out: init::LeftOut| LeftOut {
        path: left_out.path,
        reason: left_out.reason,
    };
    Artifacts {
        files: found.files.into_iter().map(file).collect(),
        left_out: found.left_out.into_iter().map(left_out).collect(),
        left_out_count: found.left_out_count,
    }
}

pub(super) fn encode_started(form: Option<init::Form>) -> Started {
    let (agent, cold_reason) = match form {
        None => (started::Agent::Unspecified, String::new()),
        Some(form) if form.parked => (started::Agent::Parked, String::new()),
        Some(form) => (started::Agent::Cold, form.reason),
    };
    Started {
        agent: agent.into(),
        cold_reason,
    }
}

/// The part of the output after the offset `known`, which moves to the end of the output. So output
/// that a driver repeats is sent only once.
pub(super) fn new_part(known: &mut u64, mut output: node::Output) -> Option<node::Output> {
    let end = output.offset + output.data.len() as u64;
    let told = usize::try_from(known.saturating_sub(output.offset)).ok()?;
    if told >= output.data.len() {
        return None;
    }
    output.data.advance(told);
    output.offset = end - output.data.len() as u64;
    *known = end;
    Some(output)
}

pub(super) fn encode_output(output: node::Output) -> Output {
    Output {
        offset: output.offset,
        data: output.data,
    }
}

pub(crate) fn encode_end(end: node::Ended, timeline: Vec<Stage>, warm: bool) -> Exited {
    let reason = match end.reason() {
        ended::Reason::Unspecified => ExitReason::Unspecified,
        ended::Reason::Exited => ExitReason::Exited,
        ended::Reason::Signaled => ExitReason::Signaled,
        ended::Reason::OutOfMemory => ExitReason::OutOfMemory,
        ended::Reason::Deadline => ExitReason::Deadline,
        ended::Reason::Cancelled => ExitReason::Cancelled,
        ended::Reason::NotStarted => ExitReason::NotStarted,
        ended::Reason::Lost => ExitReason::Lost,
        ended::Reason::CredentialRefused => ExitReason::CredentialRefused,
        ended::Reason::ApiUnavailable => ExitReason::ApiUnavailable,
        ended::Reason::BudgetExhausted => ExitReason::BudgetExhausted,
    };
    Exited {
        reason: reason.into(),
        exit_code: end.exit_code,
        signal: end.signal,
        message: end.message,
        timeline,
        warm,
        stdout_bytes: end.stdout_bytes,
        stderr_bytes: end.stderr_bytes,
        artifact_bytes: end.artifact_bytes,
        oom_kills: end.oom_kills,
        usage: encode_usage(end.usage),
        api_errors: encode_errors(end.api_errors),
    }
}

pub(crate) fn encode_usage(usage: Vec<broker::ModelUsage>) -> Vec<ModelUsage> {
    let encode = |used: broker::ModelUsage| ModelUsage {
        provider: used.provider,
        model: used.model,
        requests: used.requests,
        input_tokens: used.input_tokens,
        cached_input_tokens: used.cached_input_tokens,
        cache_write_tokens: used.cache_write_tokens,
        output_tokens: used.output_tokens,
    };
    usage.into_iter().map(encode).collect()
}

pub(crate) fn encode_errors(errors: Vec<broker::ApiError>) -> Vec<ApiError> {
    let encode = |error: broker::ApiError| ApiError {
        provider: error.provider,
        status: error.status,
        count: error.count,
    };
    errors.into_iter().map(encode).collect()
}

pub(crate) fn encode_destinations(destinations: Vec<broker::Destination>) -> Vec<Destination> {
    let encode = |destination: broker::Destination| Destination {
        host: destination.host,
        port: destination.port,
        address: destination.address,
        denied: destination.denied,
        connections: destination.connections,
        sent_bytes: destination.sent_bytes,
        received_bytes: destination.received_bytes,
        failed: destination.failed,
    };
    destinations.into_iter().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_a_driver_tells_twice_is_heard_once(
            parts in prop::collection::vec((0usize..100, 0usize..30), 0..40),
        ) {
            let all: Vec<u8> = (0..=255).collect();
            let (mut known, mut heard) = (0, Vec::new());
            for (back, length) in parts {
                let from = usize::try_from(known).unwrap().saturating_sub(back);
                let data = all[from..all.len().min(from + length)].to_vec().into();
                let offset = from as u64;
                if let Some(new) = new_part(&mut known, node::Output { offset, data }) {
                    prop_assert_eq!(new.offset, heard.len() as u64);
                    heard.extend_from_slice(&new.data);
                }
                prop_assert_eq!(known, heard.len() as u64);
            }
            prop_assert!(all.starts_with(&heard));
        }
    }
}
