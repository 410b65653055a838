//! A claim, checked: what a shim wants to run in a slot.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use polydev_proto::{
    broker::{self, Policy},
    exec,
    execution::{self, Presented},
    id::{RunId, SlotId, UserId},
    init::{MAX_SEALED, Start, TraceContext, Variable},
    node, workspace,
};
use prost::Message;
use sha2::{Digest, Sha256};

use super::Ballot;
use crate::{headroom, life, run::journal};

/// How much of each stream init may hold while the driver does not read.
const OUTPUT_BUFFER: u32 = 1 << 20;
/// The longest timeout of a run.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
const MAX_KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// Well below the maximum age of a run id.
const MAX_LEASE: Duration = Duration::from_secs(30 * 60);

/// Longest name of a caller, in bytes: the journal stores it.
const MAX_CALLER: usize = 1024;

/// Maximum age of a run id at its claim. A driver remembers for longer which ids it has run.
pub const MAX_ID_AGE: Duration = Duration::from_secs(3600);
/// How far the clock that made a run id may be ahead of this machine's clock when the run is
/// claimed. The clock is the caller's or the shim's.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);

/// A final refusal: nothing of the command ran.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("{0}")]
    Taken(life::Refused),
    #[error("this node has no room for another run")]
    Full(#[from] headroom::Full),
    #[error("this node has no room for another run: {held} runs use up its memory for output")]
    NoOutput { held: usize },
    #[error("this node's broker is away, and containers of this pool need it for every connection")]
    NoBroker,
    #[error("the rules of this node's firewall for slots are not in force: {reason}")]
    Unguarded { reason: String },
    #[error("this node cannot record another run")]
    Journal(#[from] journal::Error),
    #[error("another try of the run has precedence, with attempt {}", fence.attempt)]
    Fenced { fence: Ballot },
    #[error("`run_id` {run_id} belongs to another command")]
    OtherCommand { run_id: RunId },
    #[error("this node has seen `run_id` {run_id} with another user's run")]
    OtherUser { run_id: RunId },
    #[error("`run_id` {run_id} has run; its results are no longer kept")]
    Released { run_id: RunId },
    #[error("this node has no slot `{slot_id}`")]
    UnknownSlot { slot_id: SlotId },
    #[error("the claim came too late to start")]
    TooLate,
    #[error("the claim is for start `{given}` of the driver, but this is start `{actual}`")]
    OtherStart { given: String, actual: String },
    #[error("the slot's container failed before the command was started: {reason}")]
    Broken { reason: String },
    #[error("the driver died before the command was started")]
    NotReached,
    #[error("execution token invalid")]
    Token(#[from] execution::Invalid),
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

/// A field of a claim that no slot would accept.
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

fn in_spec(error: exec::Invalid) -> Invalid {
    invalid(&format!("spec.{}", error.field), error.problem)
}

/// The checked part of a claim's message.
#[derive(Debug)]
pub struct Parsed {
    pub run_id: RunId,
    pub user_id: UserId,
    /// By the name that roles know.
    pub caller: String,
    pub caller_user: String,
    pub ballot: Ballot,
    /// The token, and what it must fit.
    pub presented: Presented,
    /// See [`spec_hash`].
    pub spec_hash: String,
    pub start: Start,
    /// For the broker.
    pub sealed_keys: Bytes,
    /// For the broker too.
    pub policy: Option<Policy>,
    pub timeout: Duration,
    pub kill_timeout: Duration,
    /// How long an API may be overloaded; `None` for no limit.
    pub max_api_wait: Option<Duration>,
    pub drop_oldest: bool,
    /// How much of its input is files.
    pub files_bytes: u64,
}

/// SHA-256, in hexadecimal, over everything that is executed and for whom. Of secrets it
/// includes only the names.
#[must_use]
pub fn spec_hash(user_id: &str, spec: &node::RunSpec) -> String {
    let mut hash = Sha256::new();
    let mut add = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_be_bytes());
        hash.update(bytes);
    };
    add(user_id.as_bytes());
    let mut spec = spec.clone();
    // The files and the hash of the input say it, and an earlier shim does not.
    (spec.input_from, spec.input_bytes) = (0, 0);
    if let Some(prompt) = &mut spec.prompt {
        // Words, which another shim may choose differently.
        prompt.cold_reason.clear();
    }
    // Maps are sorted, so the same spec has the same bytes.
    add(&spec.encode_to_vec());
    hex::encode(hash.finalize())
}

/// Checks a claim and converts it to init's format.
///
/// # Errors
/// [`Invalid`] with the field's name.
pub fn parse(claim: node::Claim, presented: Presented) -> Result<Parsed, Invalid> {
    let spec = claim.spec.ok_or_else(|| invalid("spec", "is missing"))?;
    let secrets = claim.sealed_secrets;
    if secrets.len() > MAX_SEALED {
        let problem = format!(
            "has {} bytes; at most {MAX_SEALED} are allowed",
            secrets.len()
        );
        return Err(invalid("sealed_secrets", problem));
    }
    for (field, name) in [
        ("caller", &claim.caller),
        ("caller_user", &claim.caller_user),
    ] {
        if name.len() > MAX_CALLER {
            let problem = format!("is longer than {MAX_CALLER} bytes");
            return Err(invalid(field, problem));
        }
    }
    let sealed_keys = claim.sealed_keys;
    if sealed_keys.len() > broker::MAX_SEALED {
        let problem = format!(
            "has {} bytes; at most {} are allowed",
            sealed_keys.len(),
            broker::MAX_SEALED
        );
        return Err(invalid("sealed_keys", problem));
    }
    exec::check(
        spec.argv.iter().map(|arg| &arg[..]),
        spec.env
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str())),
    )
    .map_err(in_spec)?;
    let files_bytes = workspace::check_files(&spec.files).map_err(in_spec)?;
    let artifacts = spec.artifacts.as_ref();
    artifacts
        .map_or(Ok(()), workspace::check_rules)
        .map_err(in_spec)?;
    let terminal = spec
        .terminal
        .map(|size| workspace::check_size("terminal", size));
    terminal.unwrap_or(Ok(())).map_err(in_spec)?;
    let run_id = run_id(&claim.run_id)?;
    let ballot = claim
        .ballot
        .ok_or_else(|| invalid("ballot", "is missing"))?;
    let spec_hash = spec_hash(&claim.user_id, &spec);
    if !spec.work_dir.is_empty() && !spec.work_dir.starts_with('/') {
        return Err(invalid("spec.work_dir", "is not an absolute path"));
    }
    let timeout = bounded(
        "spec.timeout",
        spec.timeout,
        Duration::from_millis(1),
        MAX_TIMEOUT,
    )?;
    let kill_timeout = bounded(
        "spec.kill_timeout",
        spec.kill_timeout,
        Duration::ZERO,
        MAX_KILL_TIMEOUT,
    )?;
    let max_api_wait = spec.max_api_wait.map(|given| {
        let least = Duration::from_millis(1);
        bounded("spec.max_api_wait", Some(given), least, MAX_TIMEOUT)
    });
    let max_api_wait = max_api_wait.transpose()?;

    let variable = |(name, value): (&String, &String)| Variable {
        name: Bytes::copy_from_slice(name.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
    };
    let start = Start {
        run_id: run_id.into(),
        env: spec.env.iter().map(variable).collect(),
        argv: spec.argv,
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
        sealed_secrets: secrets,
        files: spec.files,
        terminal: spec.terminal,
        artifacts: spec.artifacts,
        prompt: spec.prompt,
        // The slot knows.
        reaches: true,
    };
    Ok(Parsed {
        run_id,
        user_id: claim.user_id.into(),
        caller: claim.caller,
        caller_user: claim.caller_user,
        ballot: ballot.into(),
        presented,
        spec_hash,
        start,
        sealed_keys,
        policy: claim.policy,
        timeout,
        kill_timeout,
        max_api_wait,
        drop_oldest: spec.drop_oldest,
        files_bytes,
    })
}

/// A role restricts what a run reaches, and nothing in this pool could.
pub(crate) fn not_restricted() -> Invalid {
    let problem = "is what the caller's role says, and needs a pool with a list in \
                   `egress.allow`: this one has the internet";
    invalid("policy.egress", problem)
}

/// The id of a run, in the field `run_id`.
///
/// # Errors
/// [`Invalid`] if it is not a UUIDv7.
pub fn run_id(text: &str) -> Result<RunId, Invalid> {
    let parsed = text.parse();
    parsed.map_err(|_| invalid("run_id", format!("is `{text}`, which is not a UUIDv7")))
}

/// Checks that an unknown run id can belong to a new run.
///
/// # Errors
/// [`Invalid`] if the id is too old, or from the future.
pub fn check_age(run_id: RunId, now: SystemTime) -> Result<(), Invalid> {
    if run_id.made_at() + MAX_ID_AGE < now {
        let problem = "was made more than an hour ago; a new run needs a new id";
        return Err(invalid("run_id", format!("{run_id} {problem}")));
    }
    check_made(run_id, now)
}

/// Checks that a run id was made. One from the future would be forgotten too early.
///
/// # Errors
/// [`Invalid`]
pub fn check_made(run_id: RunId, now: SystemTime) -> Result<(), Invalid> {
    if run_id.made_at() > now + MAX_CLOCK_SKEW {
        let problem = format!("{run_id} was made in the future");
        return Err(invalid("run_id", problem));
    }
    Ok(())
}

/// The duration of a lease.
///
/// # Errors
/// [`Invalid`] if it is missing or out of bounds.
pub fn lease_time(given: Option<prost_types::Duration>) -> Result<Duration, Invalid> {
    bounded("time", given, Duration::from_millis(1), MAX_LEASE)
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
            format!("is `{given}`; must be {least:?} to {} s", most.as_secs()),
        )
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_id_tells_its_time() {
        let now = SystemTime::now();
        let at = |time| RunId::new(time, [1; 10]);
        let hour = Duration::from_secs(3600);
        assert!(check_age(at(now), now).is_ok());
        assert!(check_age(at(now - hour / 2), now).is_ok());
        assert!(check_age(at(now + MAX_CLOCK_SKEW / 2), now).is_ok());
        let refused = |id: &str, words: &str| {
            let checked = run_id(id).and_then(|id| check_age(id, now));
            let error = checked.unwrap_err().to_string();
            assert!(
                error.starts_with("`run_id` ") && error.contains(words),
                "{error}"
            );
        };
        refused(&at(now - 2 * hour).to_string(), "more than an hour ago");
        refused(&at(now + hour).to_string(), "in the future");
        refused(&uuid::Uuid::new_v4().to_string(), "not a UUIDv7");
        refused("42", "is `42`");
    }

    #[test]
    fn what_is_executed_is_in_the_hash_with_the_names_of_secrets() {
        let spec = |argv: &[&'static str], secret: &str| node::RunSpec {
            argv: argv
                .iter()
                .map(|arg| Bytes::from_static(arg.as_bytes()))
                .collect(),
            secret_names: vec![secret.to_owned()],
            ..Default::default()
        };
        let hash = spec_hash("alice", &spec(&["a", "b"], "KEY"));
        assert_eq!(hash, spec_hash("alice", &spec(&["a", "b"], "KEY")));
        for other in [
            spec_hash("bob", &spec(&["a", "b"], "KEY")),
            spec_hash("alice", &spec(&["ab"], "KEY")),
            spec_hash("alice", &spec(&["a", "b"], "OTHER")),
        ] {
            assert_ne!(hash, other);
        }
    }
}
