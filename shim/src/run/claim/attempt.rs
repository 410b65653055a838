//! One claim at one driver, and its outcome.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use polydev_proto::{
    execution::Place,
    id::{RunId, UserId},
    node::{
        self, Ballot, ClaimRequest, RunInput, claim_request, fence_response::Answer,
        node_service_client::NodeServiceClient,
    },
    sealed,
};
use prost_types::Timestamp;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, transport::Channel};
use tracing::Instrument;

use super::MAX_RETRY_INTERVAL;
use crate::{
    permission::Permission,
    pool::{Candidate, View},
    run::{
        Connection, Error, Events, MAX_INPUTS,
        fence::{self, Announced, Fenced, Have, announce, fence},
        request::Request,
        terms::Terms,
    },
    secret::Prepared,
};
use polydev_transport::backoff::Backoff;

/// A claim must start within this time. A driver grants one in about a millisecond.
const START_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than [`START_TIMEOUT`]: after it, the driver has refused or something is broken.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the shim waits for a driver that gave no clear answer. After this time the claim can
/// no longer start.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(20);
/// If a node left the cluster this long before the run id was made, other shims knew it too.
const LEFT_MARGIN: Duration = Duration::from_secs(60);

/// The outcome of a claim.
pub(super) enum Attempt {
    Granted(Box<Connection>),
    /// The run is not in the slot. The slot itself is fine, but its node has no room or no broker
    /// for the run, or has its id for another try or another user, or the node is newer than the
    /// run and no other node can tell whether the command ran.
    NoRoom(String),
    /// The run is not in the slot.
    Refused(String),
}

/// A driver's answer.
enum Tried {
    /// The claim is settled.
    Clear(Attempt),
    /// Another try of the run, or another user's run with its id, came first.
    Overtaken(String),
    /// The claim may have been granted.
    Unclear(String),
}

/// The claims of one run by this shim, each with a ballot of its own.
pub(super) struct Attempts<'a> {
    view: &'a View,
    pub(super) terms: Terms,
    accept_duplicate: bool,
    run_id: RunId,
    user_id: UserId,
    ballot: Ballot,
    claim: node::Claim,
    /// Who signs the claims.
    permission: Option<Permission>,
    /// The secrets, which are sealed for each container that is tried.
    secrets: Prepared,
}

impl<'a> Attempts<'a> {
    pub(super) fn new(view: &'a View, request: Request) -> Self {
        Self {
            view,
            terms: request.terms(),
            accept_duplicate: request.accept_duplicate,
            run_id: request.run_id,
            user_id: request.user_id.clone(),
            ballot: Ballot {
                attempt: request.attempt,
                nonce: rand::random(),
            },
            claim: node::Claim {
                run_id: request.run_id.into(),
                user_id: request.user_id.into(),
                caller: request.caller.name,
                caller_user: request.caller.user.unwrap_or_default(),
                spec: Some(request.spec),
                trace: request.trace,
                ..Default::default()
            },
            permission: request.permission,
            secrets: request.secrets,
        }
    }

    /// Somebody has approved the run.
    pub(super) fn approved_by(&mut self, approver: &str) {
        if let Some(permission) = &mut self.permission {
            permission.approved_by(approver);
        }
    }

    /// Makes sure that no other try of the run can still get a container. If another try has got
    /// one, returns the connection to the run.
    pub(super) async fn fence(&mut self) -> Result<Option<Connection>, Error> {
        let run = (self.run_id, &self.user_id);
        let fenced = fence(self.view, run, self.ballot, self.accept_duplicate);
        match fenced.await? {
            Fenced::All(ballot) => {
                self.ballot = ballot;
                Ok(None)
            }
            Fenced::Have(have) => self.repeat(have).await.map(Some),
        }
    }

    /// Claims a slot. If the driver's answer is not clear, finds out the outcome.
    pub(super) async fn at(&mut self, slot: &Candidate) -> Result<Attempt, Error> {
        let span = tracing::info_span!(
            "claim",
            slot_id = %slot.slot_id,
            generation = %slot.generation
        );
        self.claim_at(slot).instrument(span).await
    }

    async fn claim_at(&mut self, slot: &Candidate) -> Result<Attempt, Error> {
        let (found, reason) = match self.ask(slot).await? {
            Tried::Clear(attempt) => {
                if let Attempt::Granted(connection) = &attempt
                    && is_in(connection, slot)
                {
                    slot.granted(&self.user_id, self.run_id);
                }
                return Ok(attempt);
            }
            Tried::Overtaken(reason) => {
                let found = self.fence().await?;
                return Ok(found.map_or(Attempt::NoRoom(reason), |connection| {
                    Attempt::Granted(Box::new(connection))
                }));
            }
            Tried::Unclear(reason) => match timeout(SETTLE_TIMEOUT, self.settle(slot)).await {
                Ok(found) => (found?, reason),
                Err(_) => {
                    let slot_id = slot.slot_id.clone();
                    return Err(Error::Unclear { slot_id, reason });
                }
            },
        };
        Ok(match found {
            Some(connection) => Attempt::Granted(Box::new(connection)),
            None => Attempt::Refused(reason),
        })
    }

    async fn ask(&mut self, slot: &Candidate) -> Result<Tried, Error> {
        if let Some(reason) = self.terms.misfit(slot) {
            return Ok(Tried::Clear(Attempt::Refused(reason.into())));
        }
        self.claim.policy = self.terms.policy(self.view)?;
        let is_newer = self.run_id.made_at() < slot.since;
        if is_newer && let Some(tried) = self.announce(slot).await? {
            return Ok(tried);
        }
        self.ballot.attempt += 1;
        self.claim.slot_id = slot.slot_id.clone().into();
        self.claim.start_id.clone_from(&slot.start_id);
        self.claim.generation = slot.generation.0;
        let start_by = slot.driver_time(START_TIMEOUT);
        self.claim.start_by = Some(Timestamp::from(start_by));
        if !self.secrets.is_empty() {
            let run_id = &self.claim.run_id;
            match sealed::seal(&slot.public_key, run_id, &self.secrets.secrets()) {
                Ok(sealed) => self.claim.sealed_secrets = sealed,
                Err(error) => return Ok(Tried::Clear(Attempt::Refused(error.to_string()))),
            }
        }
        if let Some(keys) = self.secrets.keys() {
            if slot.broker_key.is_empty() {
                let reason = "the node has no broker for the API key of the run";
                return Ok(Tried::Clear(Attempt::NoRoom(reason.into())));
            }
            match sealed::seal_keys(&slot.broker_key, &self.claim.run_id, &keys) {
                Ok(sealed) => self.claim.sealed_keys = sealed,
                Err(error) => return Ok(Tried::Clear(Attempt::Refused(error.to_string()))),
            }
        }
        let place = Place {
            audience: &slot.identity,
            image: &slot.image,
            egress: slot.egress.as_ref(),
            expires_at: start_by,
        };
        let (node_id, channel) = (slot.node_id.clone(), slot.channel.clone());
        self.send(node_id, channel, Some(place)).await
    }

    /// Reports to the other nodes that the run goes to a node that is newer than the run.
    /// Returns the outcome of the claim if the run may not go there.
    async fn announce(&self, slot: &Candidate) -> Result<Option<Tried>, Error> {
        let (run, node_id) = ((self.run_id, &self.user_id), &slot.node_id);
        let since = self.run_id.made_at().checked_sub(LEFT_MARGIN);
        let others = self.view.channels_since(since);
        let tried = match announce(others, run, self.ballot.nonce, node_id).await {
            Announced::Have(have) => {
                let connection = self.repeat(have).await?;
                Tried::Clear(Attempt::Granted(Box::new(connection)))
            }
            Announced::Overtaken => Tried::Overtaken("another try of the run came first".into()),
            // The slot itself is fine: a lease stays valid, and another node may be older.
            Announced::Nobody { nodes } if !self.accept_duplicate => {
                Tried::Clear(Attempt::NoRoom(format!(
                    "node {node_id} is newer than the run, and no other node can tell whether the \
                     command ran: {}",
                    nodes.join(", ")
                )))
            }
            Announced::Alone | Announced::Nobody { .. } => return Ok(None),
        };
        Ok(Some(tried))
    }

    /// Repeats the claim at a node that has the run: the node answers with the run if the command
    /// is the same.
    async fn repeat(&self, have: Have) -> Result<Connection, Error> {
        let Have { node_id, channel } = have;
        // Nothing is executed there: a run that a node has needs no token.
        match self.send(node_id.clone(), channel, None).await? {
            Tried::Clear(Attempt::Granted(connection)) => Ok(*connection),
            Tried::Clear(Attempt::NoRoom(reason) | Attempt::Refused(reason))
            | Tried::Overtaken(reason) => Err(Error::NotRun { reason }),
            Tried::Unclear(_) => Err(Error::Unasked {
                nodes: vec![node_id],
            }),
        }
    }

    /// Asks a driver that gave no clear answer until it gives one. Returns the connection to the
    /// run, or `None` if the driver has not granted the claim and never will. Only this driver got
    /// the claim.
    async fn settle(&mut self, slot: &Candidate) -> Result<Option<Connection>, Error> {
        let mut pauses = Backoff::steady(MAX_RETRY_INTERVAL);
        loop {
            let channel = self.view.channel(&slot.node_id).await;
            self.ballot.attempt += 1;
            let run = (self.run_id, &self.user_id);
            match fence::ask(channel.clone(), run, self.ballot, "").await {
                Ok((Answer::Have(_), _)) => {
                    let node_id = slot.node_id.clone();
                    return self.repeat(Have { node_id, channel }).await.map(Some);
                }
                Ok((Answer::OtherUser(_), _)) => return Ok(None),
                Ok((Answer::Fenced(fence), _)) if fence == self.ballot => return Ok(None),
                Ok((Answer::Fenced(_), _)) => return self.fence().await,
                // The driver cannot answer later either.
                Ok((Answer::Unknown(_), _)) => std::future::pending().await,
                Err(status) => tracing::debug!(%status, "not settled yet"),
            }
            sleep(pauses.next_wait()).await;
        }
    }

    async fn send(
        &self,
        node_id: String,
        channel: Channel,
        place: Option<Place<'_>>,
    ) -> Result<Tried, Error> {
        let mut claim = self.claim.clone();
        claim.ballot = Some(self.ballot);
        if let (Some(permission), Some(place)) = (&self.permission, place) {
            claim.token = Some(permission.sign(&claim, place));
        }
        let (inputs, queue) = mpsc::channel::<RunInput>(MAX_INPUTS);
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
        let status = match timeout(ANSWER_TIMEOUT, call).await {
            Ok(Ok(connection)) => {
                return Ok(Tried::Clear(Attempt::Granted(Box::new(connection))));
            }
            Ok(Err(status)) => status,
            Err(_) => {
                let reason = format!("no answer in {} s", ANSWER_TIMEOUT.as_secs());
                return Ok(Tried::Unclear(reason));
            }
        };
        let reason = status.message().to_owned();
        match status.code() {
            Code::FailedPrecondition | Code::PermissionDenied => {
                Ok(Tried::Clear(Attempt::Refused(reason)))
            }
            Code::ResourceExhausted => Ok(Tried::Clear(Attempt::NoRoom(reason))),
            Code::Aborted => Ok(Tried::Overtaken(reason)),
            Code::InvalidArgument => Err(Error::Refused { reason }),
            Code::AlreadyExists => Err(Error::OtherCommand { reason }),
            _ => Ok(Tried::Unclear(reason)),
        }
    }
}

/// Whether the run is in this slot: a run that was claimed before may be in another container.
fn is_in(connection: &Connection, slot: &Candidate) -> bool {
    (&connection.slot_id, connection.generation) == (&slot.slot_id, slot.generation)
}
