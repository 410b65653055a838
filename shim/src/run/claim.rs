//! Getting a run its container: an idle slot is claimed, and only after a definite
//! refusal the next.

use std::time::{Duration, Instant};

use polydev_proto::node::{
    self, ClaimRequest, ClaimResponse, claim_request, node_service_client::NodeServiceClient,
};
use prost_types::Timestamp;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use super::{Error, SLOT_WAIT, request::Request};
use crate::pool::{Candidate, View};

/// A claim must start within this time. A driver grants one in about a millisecond.
const START_BY: Duration = Duration::from_secs(5);
/// Longer than [`START_BY`]: after it, the driver has refused or something is broken.
const ANSWER: Duration = Duration::from_secs(10);
/// Between a refusal and the next slot; doubled with each refusal.
const AGAIN: Duration = Duration::from_millis(20);
const AGAIN_MOST: Duration = Duration::from_millis(500);
/// Input on its way to the driver; each at most 64 KiB.
const INPUTS: usize = 16;

/// A run that has its container.
#[derive(Debug)]
pub struct Claimed {
    pub slot_id: String,
    pub node_id: String,
    pub generation: u64,
    /// When the claim that was granted was sent: the driver's times count from then.
    pub sent: Instant,
    pub inputs: mpsc::Sender<ClaimRequest>,
    pub events: Streaming<ClaimResponse>,
}

/// Claims a slot for `request`.
///
/// # Errors
/// [`Error`]; the command has not run, except with [`Error::Unclear`].
///
/// # Cancel safety
/// The driver ends a claim whose call is dropped.
pub async fn claim(view: &View, request: Request) -> Result<Claimed, Error> {
    let give_up = tokio::time::Instant::now() + SLOT_WAIT;
    let provider = request.provider.name();
    let claim = node::Claim {
        run_id: request.run_id.to_string(),
        user_id: request.user_id,
        spec: Some(request.spec),
        secrets: Some(request.secrets),
        trace: request.trace,
        ..Default::default()
    };
    let (mut last_refusal, mut again) = (None, AGAIN);
    loop {
        let Ok(slot) = tokio::time::timeout_at(give_up, view.idle_slot(provider)).await else {
            return Err(none_idle(view, provider, last_refusal));
        };
        match try_slot(&slot, claim.clone()).await? {
            Tried::Claimed(claimed) => {
                slot.granted();
                return Ok(*claimed);
            }
            Tried::Refused(reason) => {
                tracing::info!(
                    slot = slot.slot_id,
                    reason,
                    "a claim was refused, trying another slot"
                );
                last_refusal = Some(reason);
                if tokio::time::Instant::now() >= give_up {
                    return Err(none_idle(view, provider, last_refusal));
                }
                // The view learns why in a moment; until then the same slot may come up.
                sleep(again.mul_f64(rand::random_range(0.5..1.0))).await;
                again = AGAIN_MOST.min(again * 2);
            }
        }
    }
}

enum Tried {
    Claimed(Box<Claimed>),
    Refused(String),
}

async fn try_slot(slot: &Candidate, mut claim: node::Claim) -> Result<Tried, Error> {
    claim.slot_id.clone_from(&slot.slot_id);
    claim.start_id.clone_from(&slot.start_id);
    claim.generation = slot.generation;
    claim.start_by = Some(Timestamp::from(slot.driver_time(START_BY)));

    let (inputs, requests) = mpsc::channel(INPUTS);
    let first = ClaimRequest {
        message: Some(claim_request::Message::Claim(Box::new(claim))),
    };
    inputs.try_send(first).expect("an empty queue has room");
    let sent = Instant::now();
    let mut client = NodeServiceClient::new(slot.channel.clone());
    let answer = timeout(ANSWER, client.claim(ReceiverStream::new(requests))).await;
    let unclear = |reason: String| Error::Unclear {
        slot_id: slot.slot_id.clone(),
        reason,
    };
    match answer {
        Err(_) => Err(unclear(format!("no answer in {} s", ANSWER.as_secs()))),
        Ok(Ok(response)) => Ok(Tried::Claimed(Box::new(Claimed {
            slot_id: slot.slot_id.clone(),
            node_id: slot.node_id.clone(),
            generation: slot.generation,
            sent,
            inputs,
            events: response.into_inner(),
        }))),
        Ok(Err(status)) => match status.code() {
            Code::Aborted
            | Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::ResourceExhausted => Ok(Tried::Refused(status.message().to_owned())),
            Code::InvalidArgument => Err(Error::Refused {
                reason: status.message().to_owned(),
            }),
            _ => Err(unclear(status.message().to_owned())),
        },
    }
}

fn none_idle(view: &View, provider: &'static str, last_refusal: Option<String>) -> Error {
    if view.nodes().0 == 0 {
        return Error::NoNode;
    }
    let pool = match view.counts().get(provider) {
        None => "there is no slot of this provider".to_owned(),
        Some(pool) => format!(
            "of its slots {} are idle, {} warming, {} claimed, {} recycling, {} draining, {} failed",
            pool.idle, pool.warming, pool.claimed, pool.recycling, pool.draining, pool.failed
        ),
    };
    let refused = last_refusal.map_or_else(String::new, |reason| format!("; {reason}"));
    Error::NoIdleSlot {
        provider,
        pool: pool + &refused,
    }
}
