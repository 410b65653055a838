//! One run, in the order it happens: [`request`] checks what the caller wants,
//! [`claim`] gets it a container, [`relay`] carries it to its end.

pub mod claim;
pub mod relay;
pub mod request;

use std::time::Duration;

/// How long a run waits for a slot to become idle before its caller is told that
/// there is none.
pub const SLOT_WAIT: Duration = Duration::from_secs(10);

/// Why a run came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Invalid(#[from] request::Invalid),
    #[error("no `{provider}` slot became idle within {} s; {pool}", SLOT_WAIT.as_secs())]
    NoIdleSlot {
        provider: &'static str,
        pool: String,
    },
    #[error("no node can be reached")]
    NoNode,
    #[error("the driver refused the run: {reason}")]
    Refused { reason: String },
    #[error("slot `{slot_id}` gave no clear answer, the command may have run: {reason}")]
    Unclear { slot_id: String, reason: String },
    #[error("the connection to slot `{slot_id}` broke, the command may still have run: {reason}")]
    Lost { slot_id: String, reason: String },
}
