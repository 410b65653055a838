//! One run, in the order it happens. [`request`] checks what the caller wants. [`fence`] makes
//! sure that the run is nowhere else. [`queue`] keeps the runs that wait, and [`on_demand`]
//! orders a slot for one of them when none is idle. [`claim`] gets the run its container, and
//! [`relay`] carries it to its end; [`input`] is what the run reads. [`lease`] keeps a slot for
//! a run to come, and [`attach`] goes back to a run when a connection broke on the way.
//! [`listing`] and [`watching`] report on runs without their output.

pub mod attach;
pub mod claim;
pub mod fence;
pub mod input;
pub mod lease;
pub mod listing;
pub mod on_demand;
pub mod queue;
pub mod relay;
pub mod request;
pub mod watching;

use std::time::{Duration, Instant};

use crate::{access, credentials, rate};
use polydev_proto::node::{AttachResponse, ClaimResponse, RunEvent, RunInput, run_event};
use tokio::{sync::mpsc, time::timeout};
use tonic::{Status, Streaming};

/// Input on its way to the driver; each at most 64 KiB.
const INPUTS: usize = 16;

/// A driver knows its runs by heart.
const ANSWER: Duration = Duration::from_secs(5);

/// A driver's answer, or UNAVAILABLE if none comes.
///
/// # Errors
/// As the driver answers.
pub async fn answered<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let answer = timeout(ANSWER, call).await;
    answer.map_err(|_| Status::unavailable("no answer in 5 s"))?
}

/// The way to a run on its node.
#[derive(Debug)]
pub struct Connection {
    pub slot_id: String,
    pub node_id: String,
    pub generation: u64,
    /// How much of its input the run has taken: of its files, and then of its stdin.
    pub stdin_offset: u64,
    /// How much of the input is files.
    pub files_bytes: u64,
    /// The slot was made for this run.
    pub on_demand: bool,
    /// When Nomad was told to make it.
    pub dispatched: Option<Instant>,
    /// When the claim was sent: the driver's times count from then.
    pub sent: Instant,
    pub inputs: mpsc::Sender<RunInput>,
    pub events: Events,
}

/// What the driver tells, to a claim or to an attach.
#[derive(Debug)]
pub enum Events {
    Claimed(Box<Streaming<ClaimResponse>>),
    Attached(Box<Streaming<AttachResponse>>),
}

impl Connection {
    /// # Errors
    /// The status of a driver that refuses, or of the wire.
    async fn new(
        node_id: String,
        sent: Instant,
        inputs: mpsc::Sender<RunInput>,
        mut events: Events,
    ) -> Result<Self, Status> {
        match events.next().await?.and_then(|event| event.event) {
            Some(run_event::Event::Attached(attached)) => Ok(Self {
                slot_id: attached.slot_id,
                node_id,
                generation: attached.generation,
                stdin_offset: attached.stdin_offset,
                files_bytes: attached.files_bytes,
                on_demand: attached.on_demand,
                dispatched: None,
                sent,
                inputs,
                events,
            }),
            _ => Err(Status::unavailable(
                "the driver does not say where the run is",
            )),
        }
    }
}

impl Events {
    /// # Cancel safety
    /// Loses nothing.
    async fn next(&mut self) -> Result<Option<RunEvent>, Status> {
        Ok(match self {
            Self::Claimed(events) => events.message().await?.and_then(|response| response.event),
            Self::Attached(events) => events.message().await?.and_then(|response| response.event),
        })
    }
}

/// Why a run came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Invalid(#[from] request::Invalid),
    #[error(transparent)]
    Denied(#[from] access::Denied),
    #[error(transparent)]
    Credential(#[from] credentials::Error),
    #[error("no `{provider}` slot became idle within {} s; {pool}", waited.as_secs_f64())]
    NoIdleSlot {
        provider: &'static str,
        waited: Duration,
        pool: String,
    },
    #[error("user `{user_id}` has as many runs going as this shim lets, still after {} s", waited.as_secs_f64())]
    AtLimit { user_id: String, waited: Duration },
    #[error(transparent)]
    Full(#[from] queue::Full),
    #[error(transparent)]
    Rate(#[from] rate::Exceeded),
    #[error(
        "this shim is stopping: a run that has begun goes on, and is attached to through another one; \
             the same run id and the next `attempt` begin one that has not"
    )]
    Stopping,
    #[error("no node can be reached")]
    NoNode,
    #[error("the driver refused the run: {reason}")]
    Refused { reason: String },
    #[error("{reason}")]
    OtherCommand { reason: String },
    #[error("the command did not run, and may be tried again: {reason}")]
    NotRun { reason: String },
    #[error("slot `{slot_id}` gave no clear answer, the command may have run: {reason}")]
    Unclear { slot_id: String, reason: String },
    #[error("the connection to slot `{slot_id}` broke, the command may still have run: {reason}")]
    Lost { slot_id: String, reason: String },
    #[error("it may have run on {}, which cannot be asked; `accept_duplicate` goes on without", nodes.join(", "))]
    MayHaveRun { nodes: Vec<String> },
    #[error("it may be on {}, which cannot be asked", nodes.join(", "))]
    Unasked { nodes: Vec<String> },
    #[error("{reason}; it may be tried again")]
    NotStarted { reason: String },
    #[error("{reason}")]
    UnknownRun { reason: String },
    #[error("run `{run_id}` is not of user `{user_id}`, but another's")]
    Forbidden { run_id: String, user_id: String },
    #[error("there is no lease `{lease_id}`: it was used, has ended or never was")]
    NoLease { lease_id: String },
    #[error("the lease `{lease_id}` is of no more use: {reason}")]
    LeaseEnded { lease_id: String, reason: String },
    #[error("{reason}")]
    BeyondEnd { reason: String },
}
