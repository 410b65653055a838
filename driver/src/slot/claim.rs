//! A claim: what a shim wants run in one slot, checked, and the two queues that
//! join it to its caller.

use std::time::{Duration, Instant};

use bytes::Bytes;
use polydev_proto::{
    exec,
    init::{File, Start, Stream, TraceContext, Variable},
    node,
};
use tokio::sync::mpsc;

/// Events that may wait for a caller that reads slowly, each at most 64 KiB. When
/// they are used up, init is not read any more and the command's pipe fills.
pub const EVENTS: usize = 16;
/// Messages from the caller that may wait for the command.
pub const INPUTS: usize = 16;
/// What init may hold of each stream while the driver does not read.
const OUTPUT_BUFFER: u32 = 1 << 20;
/// The longest run there is.
const TIMEOUT_MOST: Duration = Duration::from_secs(24 * 3600);
const KILL_TIMEOUT_MOST: Duration = Duration::from_secs(30);

/// One accepted claim on its way to a slot's keeper.
#[derive(Debug)]
pub struct Claim {
    pub run_id: String,
    /// When it reached the driver: the timeline's zero.
    pub arrived: Instant,
    /// It must not start any more from then on.
    pub start_by: Instant,
    pub start: Start,
    pub timeout: Duration,
    pub kill_timeout: Duration,
    /// Closed when the caller is gone.
    pub events: mpsc::Sender<Result<Event, Refusal>>,
    pub inputs: mpsc::Receiver<Input>,
}

/// From the caller to the command.
#[derive(Debug)]
pub enum Input {
    Stdin(Bytes),
    CloseStdin,
    Signal(i32),
}

/// From the run to the caller, in this order. Times count from the claim's arrival.
#[derive(Debug)]
pub enum Event {
    Granted {
        granted_after: Duration,
        limits_raised_after: Duration,
    },
    Started {
        after: Duration,
    },
    Output {
        stream: Stream,
        offset: u64,
        data: Bytes,
    },
    Ended(Ended),
}

/// How a run ended; after it comes nothing.
#[derive(Debug)]
pub struct Ended {
    pub reason: node::ended::Reason,
    pub exit_code: i32,
    pub signal: i32,
    pub message: String,
    pub after: Duration,
    /// When the first byte of output came; `None` without output.
    pub first_output_after: Option<Duration>,
    pub stdout_bytes: u64,
    pub stderr_bytes: u64,
}

/// A definite no: nothing of the command ran.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("{0}")]
    Taken(super::state::Refused),
    #[error("this node has no room for another run: {0}")]
    Full(#[from] super::headroom::Full),
    #[error("this node has no slot `{slot_id}`")]
    UnknownSlot { slot_id: String },
    #[error("the claim came too late to start")]
    TooLate,
    #[error("the claim names start `{given}` of the driver, this is `{actual}`")]
    OtherStart { given: String, actual: String },
    #[error("the slot's container failed before the command was started: {reason}")]
    Broken { reason: String },
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

/// A field of a claim that no slot would take.
#[derive(Debug, thiserror::Error)]
#[error("`{field}` {problem}")]
pub struct Invalid {
    pub field: String,
    pub problem: String,
}

fn invalid(field: &str, problem: impl Into<String>) -> Invalid {
    Invalid {
        field: field.into(),
        problem: problem.into(),
    }
}

/// The checked part of a claim's message.
#[derive(Debug)]
pub struct Parsed {
    pub start: Start,
    pub timeout: Duration,
    pub kill_timeout: Duration,
}

/// Checks what is to be run and puts it into init's form.
///
/// # Errors
/// [`Invalid`] with the field's name.
pub fn parse(claim: node::Claim) -> Result<Parsed, Invalid> {
    let spec = claim.spec.ok_or_else(|| invalid("spec", "is missing"))?;
    let secrets = claim.secrets.unwrap_or_default();
    let env = || spec.env.iter().chain(&secrets.env);
    exec::check(
        spec.argv.iter().map(|arg| &arg[..]),
        env().map(|(name, value)| (name.as_str(), value.as_str())),
    )
    .map_err(|error| invalid(&format!("spec.{}", error.field), error.problem))?;
    if uuid::Uuid::parse_str(&claim.run_id).is_err() {
        return Err(invalid("run_id", "is not a UUID"));
    }
    if !spec.work_dir.is_empty() && !spec.work_dir.starts_with('/') {
        return Err(invalid("spec.work_dir", "is not an absolute path"));
    }
    let timeout = bounded(
        "spec.timeout",
        spec.timeout,
        Duration::from_millis(1),
        TIMEOUT_MOST,
    )?;
    let kill_timeout = bounded(
        "spec.kill_timeout",
        spec.kill_timeout,
        Duration::ZERO,
        KILL_TIMEOUT_MOST,
    )?;

    let variable = |(name, value): (&String, &String)| Variable {
        name: Bytes::copy_from_slice(name.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
    };
    let start = Start {
        run_id: claim.run_id,
        env: env().map(variable).collect(),
        argv: spec.argv,
        files: secrets
            .files
            .into_iter()
            .map(|file| File {
                path: file.path,
                mode: 0o600,
                content: file.content,
            })
            .collect(),
        work_dir: spec.work_dir,
        stdin: spec.stdin,
        timeout_ms: millis(timeout),
        kill_timeout_ms: millis(kill_timeout),
        output_buffer_bytes: OUTPUT_BUFFER,
        trace: claim.trace.map(|trace| TraceContext {
            traceparent: trace.traceparent,
            tracestate: trace.tracestate,
        }),
        task: None,
    };
    Ok(Parsed {
        start,
        timeout,
        kill_timeout,
    })
}

fn bounded(
    field: &str,
    given: Option<prost_types::Duration>,
    least: Duration,
    most: Duration,
) -> Result<Duration, Invalid> {
    let given = given.ok_or_else(|| invalid(field, "is missing"))?;
    let parsed = Duration::try_from(given)
        .ok()
        .filter(|value| (least..=most).contains(value));
    parsed.ok_or_else(|| {
        invalid(
            field,
            format!(
                "is `{given}`, allowed are {least:?} to {} s",
                most.as_secs()
            ),
        )
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
