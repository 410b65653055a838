//! Encodes slots and the events of runs for shims.

use std::time::Duration;

use bytes::Bytes;
use polydev_proto::{
    broker::PROTOCOL_VERSION,
    node::{
        ApiErrors, EgressDenied, Ended, Granted, Lost, Output, RunEvent, Slot as SlotMessage,
        Started, StdinTaken, run_event, slot,
    },
    stream::Stream,
};
use prost_types::Timestamp;
use tonic::Status;

use super::refuse;
use crate::{
    life::State,
    run::{self, follow::Event},
    slot::Slot,
};

pub(super) fn encode_slot(slot: &Slot) -> SlotMessage {
    let life = slot.life();
    let (state, holder) = match life.state() {
        State::Warming => (slot::State::Warming, None),
        State::Idle => (slot::State::Idle, None),
        State::Leased { holder, .. } => (slot::State::Leased, Some(holder)),
        State::Claimed { holder } => (slot::State::Claimed, Some(holder)),
        State::Recycling => (slot::State::Recycling, None),
        State::Draining { holder } => (slot::State::Draining, holder.as_ref()),
        State::Failed => (slot::State::Failed, None),
    };
    let waits = matches!(life.state(), State::Idle | State::Leased { .. });
    SlotMessage {
        slot_id: slot.identity.slot_id().into(),
        provider: slot.config.provider.to_string(),
        image: slot.config.image.clone(),
        state: state.into(),
        generation: life.generation().0,
        cause: life.cause().to_owned(),
        reason: life.reason().to_owned(),
        since: Some(Timestamp::from(life.since())),
        namespace: slot.identity.namespace.clone(),
        job_id: slot.identity.job_id.clone(),
        alloc_id: slot.identity.alloc_id.clone(),
        run_id: holder
            .map(|holder| holder.run_id.into())
            .unwrap_or_default(),
        user_id: holder
            .map(|holder| holder.user_id.clone().into())
            .unwrap_or_default(),
        for_run_id: slot.config.run_id.map(String::from).unwrap_or_default(),
        public_key: match waits {
            true => slot.public_key(),
            false => Bytes::new(),
        },
        agent: waits.then(|| slot.agent()).flatten(),
        // The node's, and no slot's.
        broker_key: Bytes::new(),
        broker_version: PROTOCOL_VERSION,
        egress: slot.told_egress(),
    }
}

/// A run whose command never ran becomes a status.
pub(super) fn encode_event(event: Event) -> Result<RunEvent, Status> {
    let event = match event {
        Event::Granted(granted) => run_event::Event::Granted(Granted {
            granted_after: duration(granted.granted_after),
            limits_raised_after: duration(granted.limits_raised_after),
        }),
        Event::Started { after, form } => run_event::Event::Started(Started {
            after: duration(after),
            form,
        }),
        Event::Output {
            stream,
            offset,
            data,
        } => {
            let output = Output { offset, data };
            match stream {
                Stream::Stdout => run_event::Event::Stdout(output),
                Stream::Stderr => run_event::Event::Stderr(output),
                Stream::Artifacts => run_event::Event::ArtifactData(output),
                Stream::Events => run_event::Event::AgentEvents(output),
            }
        }
        Event::Lost { stream, from, to } => run_event::Event::Lost(Lost {
            stream: stream.number().cast_unsigned(),
            from,
            to,
        }),
        Event::Artifacts(artifacts) => run_event::Event::Artifacts((*artifacts).clone()),
        Event::ApiErrors(errors) => run_event::Event::ApiErrors(ApiErrors { errors }),
        Event::EgressDenied(destinations) => {
            run_event::Event::EgressDenied(EgressDenied { destinations })
        }
        Event::StdinTaken { offset } => run_event::Event::StdinTaken(StdinTaken { offset }),
        Event::Ended(ended) => run_event::Event::Ended(encode_ended(ended)),
        Event::Aborted(refusal) => return Err(refuse(&refusal)),
    };
    Ok(RunEvent { event: Some(event) })
}

pub(super) fn encode_ended(ended: run::Ended) -> Ended {
    Ended {
        reason: ended.reason.into(),
        exit_code: ended.exit_code,
        signal: ended.signal,
        message: ended.message,
        after: duration(ended.after),
        first_output_after: ended.first_output_after.and_then(duration),
        stdout_bytes: ended.stdout_bytes,
        stderr_bytes: ended.stderr_bytes,
        artifact_bytes: ended.artifact_bytes,
        event_bytes: ended.event_bytes,
        oom_kills: ended.oom_kills,
        usage: ended.usage,
        api_errors: ended.api_errors,
    }
}

/// A run's times always fit into a protobuf duration.
pub(super) fn duration(duration: Duration) -> Option<prost_types::Duration> {
    duration.try_into().ok()
}
