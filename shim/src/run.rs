//! One run, in the order it happens. [`request`] checks what the caller wants, and [`terms`] is
//! what the caller's role says. [`fence`] makes
//! sure that the run is nowhere else. [`queue`] keeps the runs that wait, and [`on_demand`]
//! orders a slot for one of them when none is idle. [`claim`] gets the run its container, and
//! [`relay`] carries it to its end; [`input`] is what the run reads. [`lease`] keeps a slot for
//! a run to come, [`script`] makes a run of a script, and [`attach`] goes back to a run when a connection broke on the way.
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
pub mod script;
pub mod terms;
pub mod watching;

use std::time::{Duration, Instant};

use crate::{access, approval, audit, credentials, policy, rate};
use polydev_proto::{
    id::{Generation, RunId, SlotId, UserId},
    node::{AttachResponse, ClaimResponse, RunEvent, RunInput, run_event},
};
use tokio::{sync::mpsc, time::timeout};
use tonic::{Status, Streaming};

/// Input on its way to the driver; each at most 64 KiB.
const MAX_INPUTS: usize = 16;

/// How long a driver's answer may take. A driver has its runs in memory.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A driver's answer, or UNAVAILABLE if none comes.
///
/// # Errors
/// The driver's status.
pub async fn answered<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let answer = timeout(ANSWER_TIMEOUT, call).await;
    answer.map_err(|_| Status::unavailable("no answer in 5 s"))?
}

/// The connection to a run on its node.
#[derive(Debug)]
pub struct Connection {
    pub slot_id: SlotId,
    pub node_id: String,
    pub generation: Generation,
    /// How many bytes of its input the run has taken: first its files, then its stdin.
    pub stdin_offset: u64,
    /// How many bytes of the input are files.
    pub files_bytes: u64,
    /// The slot was made for this run.
    pub on_demand: bool,
    /// When Nomad was asked to make the slot.
    pub dispatched: Option<Instant>,
    /// When the granted claim, or the attach, was sent. The driver's times count from this moment.
    pub sent: Instant,
    pub inputs: mpsc::Sender<RunInput>,
    pub events: Events,
}

/// The driver's events, as the answer to a claim or to an attach.
#[derive(Debug)]
pub enum Events {
    Claimed(Box<Streaming<ClaimResponse>>),
    Attached(Box<Streaming<AttachResponse>>),
}

impl Connection {
    /// # Errors
    /// The status of a driver that refuses, or of a broken connection.
    async fn new(
        node_id: String,
        sent: Instant,
        inputs: mpsc::Sender<RunInput>,
        mut events: Events,
    ) -> Result<Self, Status> {
        match events.next().await?.and_then(|event| event.event) {
            Some(run_event::Event::Attached(attached)) => Ok(Self {
                slot_id: attached.slot_id.into(),
                node_id,
                generation: Generation(attached.generation),
                stdin_offset: attached.stdin_offset,
                files_bytes: attached.files_bytes,
                on_demand: attached.on_demand,
                dispatched: None,
                sent,
                inputs,
                events,
            }),
            _ => Err(Status::unavailable(
                "the driver did not report where the run is",
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

/// Why a call about a run failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Invalid(#[from] request::Invalid),
    #[error(transparent)]
    Denied(#[from] access::Denied),
    #[error(transparent)]
    Policy(#[from] policy::Blocked),
    #[error(transparent)]
    Approval(#[from] approval::Error),
    #[error("nothing is done that cannot be recorded")]
    Audit(#[from] audit::Error),
    #[error(transparent)]
    Budget(#[from] access::OverBudget),
    #[error(transparent)]
    Credential(#[from] credentials::Error),
    #[error("no `{provider}` slot became idle within {} s; {pool}", waited.as_secs_f64())]
    NoIdleSlot {
        provider: &'static str,
        waited: Duration,
        pool: String,
    },
    #[error("user `{user_id}` still had as many active runs or leases as this shim allows after {} s", waited.as_secs_f64())]
    AtLimit { user_id: UserId, waited: Duration },
    #[error(transparent)]
    Full(#[from] queue::Full),
    #[error(transparent)]
    Rate(#[from] rate::Exceeded),
    #[error("this shim is already reading 64 MiB of request bodies; try again")]
    Busy,
    #[error(
        "this shim is stopping; attach through another shim to a run that has started, and start \
             any other run again with the same run id and the next `attempt`"
    )]
    Stopping,
    #[error("no node can be reached")]
    NoNode,
    #[error("the driver refused the run: {reason}")]
    Refused { reason: String },
    #[error("{reason}")]
    OtherCommand { reason: String },
    #[error("the command did not run and may be tried again: {reason}")]
    NotRun { reason: String },
    #[error("slot `{slot_id}` gave no clear answer, so the command may have run: {reason}")]
    Unclear { slot_id: SlotId, reason: String },
    #[error("the connection to slot `{slot_id}` broke, but the command may have run: {reason}")]
    Lost { slot_id: SlotId, reason: String },
    #[error("the command may have run on {}, which cannot be asked; set `accept_duplicate` to run it anyway", nodes.join(", "))]
    MayHaveRun { nodes: Vec<String> },
    #[error("cannot ask {}, which may have the run or lease", nodes.join(", "))]
    Unasked { nodes: Vec<String> },
    #[error("{reason}; the run may be tried again")]
    NotStarted { reason: String },
    #[error("{reason}")]
    UnknownRun { reason: String },
    #[error("run `{run_id}` does not belong to user `{user_id}`")]
    Forbidden { run_id: RunId, user_id: UserId },
    #[error("lease `{lease_id}` does not exist: it was used, has ended or was never granted")]
    NoLease { lease_id: RunId },
    #[error("lease `{lease_id}` can no longer be used: {reason}")]
    LeaseEnded { lease_id: RunId, reason: String },
    #[error("{reason}")]
    BeyondEnd { reason: String },
}
