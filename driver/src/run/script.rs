//! The end of a run in a slot for scripts, as `scripts` counts it.

use polydev_proto::{node::ended::Reason, provider::Provider};

use super::{Ended, Run};
use crate::scripts::{Execution, Status};

/// `None` if the run is for a CLI, or if somebody has ended it.
pub(super) fn execution(run: &Run, ended: &Ended) -> Option<Execution> {
    if run.claimed.provider != Provider::Python.name() {
        return None;
    }
    let status = match ended.reason {
        Reason::Exited if ended.exit_code == 0 => Status::Success,
        Reason::Exited | Reason::Signaled | Reason::OutOfMemory => Status::Failure,
        Reason::Deadline => Status::Timeout,
        Reason::NotStarted => Status::Error("not_started"),
        Reason::Lost | Reason::Unspecified => Status::Error("lost"),
        Reason::Cancelled
        | Reason::CredentialRefused
        | Reason::ApiUnavailable
        | Reason::BudgetExhausted => return None,
    };
    let progress = run.progress.borrow();
    let artifacts = progress.artifacts.as_ref();
    Some(Execution {
        status,
        exit_code: (ended.reason == Reason::Exited).then_some(ended.exit_code),
        duration: ended
            .after
            .saturating_sub(progress.started.unwrap_or_default()),
        outputs: artifacts.map_or(0, |artifacts| artifacts.files.len()),
    })
}
