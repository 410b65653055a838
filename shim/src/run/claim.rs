//! Getting a run its container: an idle slot is claimed, and only after a definite
//! refusal the next.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant, SystemTime},
};

use futures_util::StreamExt;
use polydev_proto::{
    node::{
        self, Ballot, ClaimRequest, RunInput, claim_request, fence_response::Answer,
        node_service_client::NodeServiceClient,
    },
    run_id::made_at,
    runtime::{Queued, RunEvent, run_event},
    sealed,
};
use prost_types::Timestamp;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, transport::Channel};

use super::{
    Connection, Error, Events, INPUTS,
    fence::{self, Announced, Fenced, Have, announce, fence},
    on_demand::{OnDemand, Order},
    queue::{Place, Queue, Running, Ticket},
    request::Request,
};
use crate::{
    credentials::Prepared,
    pool::{Candidate, View},
};

/// A claim must start within this time. A driver grants one in about a millisecond.
const START_BY: Duration = Duration::from_secs(5);
/// Longer than [`START_BY`]: after it, the driver has refused or something is broken.
const ANSWER: Duration = Duration::from_secs(10);
/// Between a refusal and the next slot; doubled with each refusal.
pub(super) const AGAIN: Duration = Duration::from_millis(20);
pub(super) const AGAIN_MOST: Duration = Duration::from_millis(500);
/// For this shim to have heard of a lease that another has got.
const HEARD: Duration = Duration::from_secs(1);
/// For a driver that gave no clear answer to come back and tell: after it, the claim can
/// start no more.
const SETTLE: Duration = Duration::from_secs(20);

/// A node that left so long before a run was made had left for the other shims too.
const LEFT: Duration = Duration::from_secs(60);
/// Nodes that are tried in one turn, if they have no room.
const NODES: usize = 8;

/// Claims a slot for `request`; a run that exists is gone back to.
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
    on_demand: &OnDemand,
    request: Request,
    caller: &mpsc::Sender<Result<RunEvent, Error>>,
) -> Result<(Connection, Option<Running>), Error> {
    let provider = request.provider.name();
    let mut attempts = Attempts {
        view,
        accept_duplicate: request.accept_duplicate,
        made: made_at(&request.run_id.to_string()),
        secrets: request.secrets,
        ballot: Ballot {
            attempt: request.attempt,
            nonce: rand::random(),
        },
        claim: node::Claim {
            run_id: request.run_id.to_string(),
            user_id: request.user_id.clone(),
            spec: Some(request.spec),
            trace: request.trace,
            ..Default::default()
        },
    };
    if request.is_retry
        && let Some(connection) = attempts.fence().await?
    {
        return Ok((connection, None));
    }
    if request.is_leased {
        // Its turn was the lease's; it counts as its user's.
        let running = queue.enter(provider, &request.user_id)?.served();
        let connection = leased(view, provider, &mut attempts).await?;
        return Ok((connection, Some(running)));
    }
    let waited = request.queue_timeout;
    let give_up = tokio::time::Instant::now() + waited;
    let user_id = request.user_id;
    let mut ticket = queue.enter(provider, &user_id)?;
    let run_id = request.run_id.to_string();
    let mut order = Some(on_demand.order(
        view.clone(),
        request.provider,
        run_id.clone(),
        ticket.place.clone(),
    ));
    let (mut last_refusal, mut again, mut dispatched) = (None, AGAIN, None);
    loop {
        let slot = wait(view, &mut ticket, provider, &run_id, caller);
        // A refused one is nobody's until the end of the pause below.
        let Ok(mut slot) = tokio::time::timeout_at(give_up, slot).await else {
            let behind = match *ticket.place.borrow() {
                Place::Behind(before) => Some(format!("{before} runs of this shim were before it")),
                Place::Held(_) => return Err(Error::AtLimit { user_id, waited }),
                Place::Next => None,
            };
            let reasons = [last_refusal.or(behind), order.as_ref().map(Order::told)];
            return Err(none_idle(view, provider, waited, reasons));
        };
        // Whoever is next may try another slot meanwhile.
        let running = ticket.served();
        // From now on the run may be in it, whatever the answer: to stop it would end the run.
        if let Some(order) = order.take_if(|_| slot.on_demand) {
            dispatched = order.used();
        }
        match attempts.in_turn(&mut slot).await? {
            Ok(mut connection) => {
                if connection.on_demand {
                    connection.dispatched = dispatched;
                }
                return Ok((connection, Some(running)));
            }
            Err(reason) => last_refusal = Some(reason),
        }
        if tokio::time::Instant::now() >= give_up {
            let reasons = [last_refusal, order.as_ref().map(Order::told)];
            return Err(none_idle(view, provider, waited, reasons));
        }
        // The view learns why in a moment; until then the same slot may come up.
        sleep(again.mul_f64(rand::random_range(0.5..1.0))).await;
        again = AGAIN_MOST.min(again * 2);
        ticket = running.back();
    }
}

/// Claims the slot that is kept for the run.
async fn leased(
    view: &View,
    provider: &str,
    attempts: &mut Attempts<'_>,
) -> Result<Connection, Error> {
    let run_id = attempts.claim.run_id.clone();
    let ended = |reason: String| Error::LeaseEnded {
        lease_id: run_id.clone(),
        reason,
    };
    let slot = timeout(HEARD, view.slot_for(&run_id)).await;
    let Ok(slot) = slot else {
        return Err(match view.channels().1 {
            nodes if nodes.is_empty() => ended("no node has it".into()),
            nodes => Error::Unasked { nodes },
        });
    };
    // What the caller may do was asked for the provider that it named.
    if slot.provider != provider {
        return Err(ended(format!("its slot is of `{}`", slot.provider)));
    }
    attempts.at(&slot).await?.map_err(|denied| match denied {
        // The lease stands.
        Denied::NoRoom(reason) => Error::NotRun { reason },
        Denied::Refused(reason) => ended(reason),
    })
}

/// The tries of one run by this shim, each with a ballot of its own.
struct Attempts<'a> {
    view: &'a View,
    accept_duplicate: bool,
    /// When the run id was.
    made: Option<SystemTime>,
    ballot: Ballot,
    claim: node::Claim,
    /// Sealed to each container that is tried.
    secrets: Prepared,
}

impl Attempts<'_> {
    /// Sees to it that no other try can get a container any more; the run, if one has.
    async fn fence(&mut self) -> Result<Option<Connection>, Error> {
        let fenced = fence(
            self.view,
            &self.claim.run_id,
            self.ballot,
            self.accept_duplicate,
        );
        match fenced.await? {
            Fenced::All(ballot) => {
                self.ballot = ballot;
                Ok(None)
            }
            Fenced::Have(have) => self.repeat(have).await.map(Some),
        }
    }

    /// Claims an idle slot, and while nodes have no room for the run, slots of other nodes; or
    /// why the last of them, which `slot` is then, was refused.
    async fn in_turn(&mut self, slot: &mut Candidate) -> Result<Result<Connection, String>, Error> {
        let mut full = BTreeSet::new();
        loop {
            let (reason, has_room) = match self.at(slot).await? {
                Ok(connection) => return Ok(Ok(connection)),
                Err(Denied::NoRoom(reason)) => (reason, false),
                Err(Denied::Refused(reason)) => (reason, true),
            };
            let slot_id = &slot.slot_id;
            tracing::info!(
                slot = slot_id,
                reason,
                "a claim was refused, trying another slot"
            );
            full.insert(slot.node_id.clone());
            // A slot on demand comes out of turn: the pool's are for who is next.
            if has_room || slot.on_demand || full.len() == NODES {
                return Ok(Err(reason));
            }
            match self.view.idle_beyond(&slot.provider, &full) {
                Some(next) => *slot = next,
                None => return Ok(Err(reason)),
            }
        }
    }

    /// Claims a slot, and finds out what became of the claim where that is not clear.
    async fn at(&mut self, slot: &Candidate) -> Result<Result<Connection, Denied>, Error> {
        let (found, reason) = match self.ask(slot).await? {
            Tried::Granted(connection) => {
                // A run that was claimed before may be in another container.
                if (&connection.slot_id, connection.generation) == (&slot.slot_id, slot.generation)
                {
                    slot.granted();
                }
                return Ok(Ok(*connection));
            }
            Tried::NoRoom(reason) => return Ok(Err(Denied::NoRoom(reason))),
            Tried::Refused(reason) => return Ok(Err(Denied::Refused(reason))),
            Tried::Overtaken(reason) => (self.fence().await?, reason),
            Tried::Unclear(reason) => match timeout(SETTLE, self.settle(slot)).await {
                Ok(found) => (found?, reason),
                Err(_) => {
                    let slot_id = slot.slot_id.clone();
                    return Err(Error::Unclear { slot_id, reason });
                }
            },
        };
        Ok(found.ok_or(Denied::Refused(reason)))
    }

    async fn ask(&mut self, slot: &Candidate) -> Result<Tried, Error> {
        let is_newer = self.made.is_none_or(|made| made < slot.since);
        if is_newer && let Some(tried) = self.announce(slot).await? {
            return Ok(tried);
        }
        self.ballot.attempt += 1;
        self.claim.slot_id.clone_from(&slot.slot_id);
        self.claim.start_id.clone_from(&slot.start_id);
        self.claim.generation = slot.generation;
        self.claim.start_by = Some(Timestamp::from(slot.driver_time(START_BY)));
        if !self.secrets.is_empty() {
            let run_id = &self.claim.run_id;
            match sealed::seal(&slot.public_key, run_id, &self.secrets.secrets()) {
                Ok(sealed) => self.claim.sealed_secrets = sealed,
                Err(error) => return Ok(Tried::Refused(error.to_string())),
            }
        }
        self.send(slot.node_id.clone(), slot.channel.clone()).await
    }

    /// Tells the other nodes that the run goes to one that is newer than it; what came of that,
    /// if it may not.
    async fn announce(&self, slot: &Candidate) -> Result<Option<Tried>, Error> {
        let (run_id, node_id) = (&self.claim.run_id, &slot.node_id);
        let since = self.made.and_then(|made| made.checked_sub(LEFT));
        let others = self.view.channels_since(since);
        let tried = match announce(others, run_id, self.ballot.nonce, node_id).await {
            Announced::Have(have) => Tried::Granted(self.repeat(have).await?.into()),
            Announced::Overtaken => Tried::Overtaken("another try of the run was here".into()),
            // Nothing is wrong with the slot: a lease stands, and another node may be older.
            Announced::Nobody { nodes } if !self.accept_duplicate => Tried::NoRoom(format!(
                "node {node_id} is newer than the run, and none of the others can tell \
                 whether it ran: {}",
                nodes.join(", ")
            )),
            Announced::Alone | Announced::Nobody { .. } => return Ok(None),
        };
        Ok(Some(tried))
    }

    /// Claims what a node has already: it answers with its run, if this is the command.
    async fn repeat(&self, have: Have) -> Result<Connection, Error> {
        let Have { node_id, channel } = have;
        match self.send(node_id.clone(), channel).await? {
            Tried::Granted(connection) => Ok(*connection),
            Tried::Refused(reason) | Tried::NoRoom(reason) | Tried::Overtaken(reason) => {
                Err(Error::NotRun { reason })
            }
            Tried::Unclear(_) => Err(Error::Unasked {
                nodes: vec![node_id],
            }),
        }
    }

    /// Asks the driver that gave no clear answer until it gives one: the run, or `None` once
    /// it has not taken the claim and will not. Only this driver was sent it.
    async fn settle(&mut self, slot: &Candidate) -> Result<Option<Connection>, Error> {
        loop {
            let channel = self.view.channel(&slot.node_id).await;
            self.ballot.attempt += 1;
            match fence::ask(channel.clone(), &self.claim.run_id, self.ballot, "").await {
                Ok((Answer::Have(_), _)) => {
                    let node_id = slot.node_id.clone();
                    return self.repeat(Have { node_id, channel }).await.map(Some);
                }
                Ok((Answer::Fenced(fence), _)) if fence == self.ballot => return Ok(None),
                Ok((Answer::Fenced(_), _)) => return self.fence().await,
                // It will not be able to tell later either.
                Ok((Answer::Unknown(_), _)) => std::future::pending().await,
                Err(status) => tracing::debug!(%status, "not settled yet"),
            }
            sleep(AGAIN_MOST.mul_f64(rand::random_range(0.5..1.0))).await;
        }
    }

    async fn send(&self, node_id: String, channel: Channel) -> Result<Tried, Error> {
        let mut claim = self.claim.clone();
        claim.ballot = Some(self.ballot);
        let (inputs, queue) = mpsc::channel::<RunInput>(INPUTS);
        let first = claim_request::Message::Claim(Box::new(claim));
        let rest = ReceiverStream::new(queue).map(claim_request::Message::Input);
        let requests = futures_util::stream::iter([first])
            .chain(rest)
            .map(|message| ClaimRequest {
                message: Some(message),
            });
        let sent = Instant::now();
        let mut client = NodeServiceClient::new(channel);
        let call = async {
            let events = client.claim(requests).await?.into_inner();
            let events = Events::Claimed(Box::new(events));
            Connection::new(node_id, sent, inputs, events).await
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
            Code::FailedPrecondition | Code::PermissionDenied => Ok(Tried::Refused(reason)),
            Code::ResourceExhausted => Ok(Tried::NoRoom(reason)),
            Code::Aborted => Ok(Tried::Overtaken(reason)),
            Code::InvalidArgument => Err(Error::Refused { reason }),
            Code::AlreadyExists => Err(Error::OtherCommand { reason }),
            _ => Ok(Tried::Unclear(reason)),
        }
    }
}

/// A definite refusal: the run is not in the slot.
enum Denied {
    Refused(String),
    /// Nothing is wrong with the slot; its node cannot have the run now.
    NoRoom(String),
}

/// What a driver answers.
enum Tried {
    Granted(Box<Connection>),
    Refused(String),
    NoRoom(String),
    /// Another try of the run has fenced this one off.
    Overtaken(String),
    /// It may have been granted.
    Unclear(String),
}

/// Waits for the run's turn, and then for a slot; the caller is told its place, if it is
/// not served at once.
async fn wait(
    view: &View,
    ticket: &mut Ticket,
    provider: &str,
    run_id: &str,
    caller: &mpsc::Sender<Result<RunEvent, Error>>,
) -> Candidate {
    let mut place = ticket.place.clone();
    let tell = async {
        loop {
            let before = match *place.borrow_and_update() {
                Place::Next => 0,
                Place::Behind(before) | Place::Held(before) => {
                    u32::try_from(before).unwrap_or(u32::MAX)
                }
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
        // Nobody else may have it, so nobody is overtaken.
        slot = view.slot_for(run_id) => slot,
        () = tell => unreachable!("it never ends"),
    }
}

pub(super) fn none_idle(
    view: &View,
    provider: &'static str,
    waited: Duration,
    reasons: [Option<String>; 2],
) -> Error {
    if view.nodes().0 == 0 {
        return Error::NoNode;
    }
    let pool = match view.counts().get(provider) {
        None => "there is no slot of this provider".to_owned(),
        Some(pool) => format!(
            "of its slots {} are idle, {} warming, {} leased, {} claimed, {} recycling, {} draining, {} failed",
            pool.idle,
            pool.warming,
            pool.leased,
            pool.claimed,
            pool.recycling,
            pool.draining,
            pool.failed
        ),
    };
    let reasons = reasons
        .into_iter()
        .flatten()
        .filter(|reason| !reason.is_empty());
    Error::NoIdleSlot {
        provider,
        waited,
        pool: reasons.fold(pool, |told, reason| format!("{told}; {reason}")),
    }
}
