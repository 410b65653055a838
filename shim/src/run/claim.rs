//! Getting a run its container: an idle slot is claimed, and only after a definite
//! refusal the next.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use polydev_proto::{
    node::{
        self, Ballot, ClaimRequest, RunInput, claim_request, fence_response::Answer,
        node_service_client::NodeServiceClient,
    },
    runtime::{Queued, RunEvent, run_event},
};
use prost_types::Timestamp;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::{
    Connection, Error, Events, INPUTS,
    attach::{Name, attach_again},
    fence::{self, Fenced, fence},
    queue::{Place, Queue, Running, Ticket},
    request::Request,
};
use crate::pool::{Candidate, View};

/// A claim must start within this time. A driver grants one in about a millisecond.
const START_BY: Duration = Duration::from_secs(5);
/// Longer than [`START_BY`]: after it, the driver has refused or something is broken.
const ANSWER: Duration = Duration::from_secs(10);
/// Between a refusal and the next slot; doubled with each refusal.
const AGAIN: Duration = Duration::from_millis(20);
const AGAIN_MOST: Duration = Duration::from_millis(500);
/// For a driver that gave no clear answer to come back and tell: after it, the claim can
/// start no more.
const SETTLE: Duration = Duration::from_secs(20);

/// Claims a slot for `request`; a run that exists is attached to.
///
/// # Errors
/// [`Error`]; the command has not run, except with [`Error::Unclear`] and
/// [`Error::MayHaveRun`].
///
/// # Cancel safety
/// A claim that was granted meanwhile runs.
pub async fn claim(
    view: &View,
    queue: &Queue,
    request: Request,
    caller: &mpsc::Sender<Result<RunEvent, Error>>,
) -> Result<(Connection, Option<Running>), Error> {
    let waited = request.queue_timeout;
    let give_up = tokio::time::Instant::now() + waited;
    let provider = request.provider.name();
    let name = Name {
        run_id: request.run_id.to_string(),
        user_id: request.user_id.clone(),
    };
    let mut ballot = Ballot {
        attempt: 0,
        nonce: rand::random(),
    };
    if request.is_retry {
        ballot.attempt = request.attempt;
        match fence(view, &name.run_id, ballot, request.accept_duplicate).await? {
            Fenced::Have => {
                let attached = super::attach::attach(view, &name, [0; 2]).await;
                return attached.map(|connection| (connection, None));
            }
            Fenced::All(fence) => ballot = fence,
        }
    }
    let mut ticket = queue.enter(provider, &request.user_id)?;
    let mut claim = node::Claim {
        run_id: name.run_id.clone(),
        user_id: request.user_id,
        spec: Some(request.spec),
        secrets: Some(request.secrets),
        trace: request.trace,
        ..Default::default()
    };
    let (mut last_refusal, mut again) = (None, AGAIN);
    loop {
        let slot = wait(view, &mut ticket, provider, caller);
        let Ok(slot) = tokio::time::timeout_at(give_up, slot).await else {
            let behind = match *ticket.place.borrow() {
                Place::Behind(before) => Some(format!(
                    "{before} runs of this shim were before it, or its user had as many as may go on at once"
                )),
                Place::Next => None,
            };
            let refusal = last_refusal.or(behind);
            return Err(none_idle(view, provider, waited, refusal));
        };
        // Whoever is next may try another slot meanwhile.
        let running = ticket.served();
        ballot.attempt += 1;
        claim.ballot = Some(ballot);
        let reason = match try_slot(&slot, claim.clone()).await? {
            Tried::Granted(connection) => {
                // A run that was claimed before may be in another slot.
                if connection.slot_id == slot.slot_id {
                    slot.granted();
                }
                return Ok((*connection, Some(running)));
            }
            Tried::Refused(reason) => reason,
            // Only this driver was sent this claim: it alone can have the run.
            Tried::Unclear(reason) => {
                match timeout(SETTLE, settle(view, &slot, &name, &mut ballot)).await {
                    Ok(Ok(Some(connection))) => return Ok((connection, Some(running))),
                    Ok(Ok(None)) => reason,
                    Ok(Err(error)) => return Err(error),
                    Err(_) => {
                        let slot_id = slot.slot_id.clone();
                        return Err(Error::Unclear { slot_id, reason });
                    }
                }
            }
        };
        tracing::info!(
            slot = slot.slot_id,
            reason,
            "a claim was refused, trying another slot"
        );
        last_refusal = Some(reason);
        if tokio::time::Instant::now() >= give_up {
            return Err(none_idle(view, provider, waited, last_refusal));
        }
        // The view learns why in a moment; until then the same slot may come up.
        sleep(again.mul_f64(rand::random_range(0.5..1.0))).await;
        again = AGAIN_MOST.min(again * 2);
        ticket = running.back();
    }
}

/// Waits for the run's turn, and then for a slot; the caller is told its place, if it is
/// not served at once.
async fn wait(
    view: &View,
    ticket: &mut Ticket,
    provider: &str,
    caller: &mpsc::Sender<Result<RunEvent, Error>>,
) -> Candidate {
    let mut place = ticket.place.clone();
    let tell = async {
        loop {
            let before = match *place.borrow_and_update() {
                Place::Next => 0,
                Place::Behind(before) => u32::try_from(before).unwrap_or(u32::MAX),
            };
            let queued = run_event::Event::Queued(Queued { before });
            // A caller that does not read is not told every change.
            let _full = caller.try_send(Ok(RunEvent {
                event: Some(queued),
            }));
            if place.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let slot = async {
        ticket.turn().await;
        view.idle_slot(provider).await
    };
    tokio::select! {
        biased;
        slot = slot => slot,
        () = tell => unreachable!("it never ends"),
    }
}

/// Asks the driver that gave no clear answer until it gives one: the run, or `None` once
/// it has not taken the claim and will not.
async fn settle(
    view: &View,
    slot: &Candidate,
    name: &Name,
    ballot: &mut Ballot,
) -> Result<Option<Connection>, Error> {
    loop {
        let channel = view.channel(&slot.node_id).await;
        ballot.attempt += 1;
        match fence::ask(channel, &name.run_id, *ballot).await {
            Ok(Answer::Have(_)) => {
                return attach_again(view, &slot.node_id, name, [0; 2])
                    .await
                    .map(Some);
            }
            Ok(Answer::Fenced(highest)) if highest.attempt <= ballot.attempt => return Ok(None),
            Ok(Answer::Fenced(highest)) => ballot.attempt = highest.attempt,
            Ok(Answer::Unknown(_)) => std::future::pending().await,
            Err(status) => tracing::debug!(%status, "not settled yet"),
        }
        sleep(AGAIN_MOST.mul_f64(rand::random_range(0.5..1.0))).await;
    }
}

enum Tried {
    Granted(Box<Connection>),
    Refused(String),
    /// It may have been granted.
    Unclear(String),
}

async fn try_slot(slot: &Candidate, mut claim: node::Claim) -> Result<Tried, Error> {
    claim.slot_id.clone_from(&slot.slot_id);
    claim.start_id.clone_from(&slot.start_id);
    claim.generation = slot.generation;
    claim.start_by = Some(Timestamp::from(slot.driver_time(START_BY)));

    let (inputs, queue) = mpsc::channel::<RunInput>(INPUTS);
    let first = claim_request::Message::Claim(Box::new(claim));
    let rest = ReceiverStream::new(queue).map(claim_request::Message::Input);
    let requests = futures_util::stream::iter([first])
        .chain(rest)
        .map(|message| ClaimRequest {
            message: Some(message),
        });
    let sent = Instant::now();
    let mut client = NodeServiceClient::new(slot.channel.clone());
    let call = async {
        let events = client.claim(requests).await?.into_inner();
        let events = Events::Claimed(Box::new(events));
        Connection::new(slot.node_id.clone(), sent, inputs, events).await
    };
    let status = match timeout(ANSWER, call).await {
        Ok(Ok(connection)) => return Ok(Tried::Granted(Box::new(connection))),
        Ok(Err(status)) => status,
        Err(_) => {
            let reason = format!("no answer in {} s", ANSWER.as_secs());
            return Ok(Tried::Unclear(reason));
        }
    };
    let reason = status.message().to_owned();
    match status.code() {
        Code::Aborted
        | Code::FailedPrecondition
        | Code::PermissionDenied
        | Code::ResourceExhausted => Ok(Tried::Refused(reason)),
        Code::InvalidArgument => Err(Error::Refused { reason }),
        Code::AlreadyExists => Err(Error::OtherCommand { reason }),
        _ => Ok(Tried::Unclear(reason)),
    }
}

fn none_idle(
    view: &View,
    provider: &'static str,
    waited: Duration,
    last_refusal: Option<String>,
) -> Error {
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
        waited,
        pool: pool + &refused,
    }
}
