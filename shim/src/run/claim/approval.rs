//! A run that waits for somebody's approval.

use polydev_proto::runtime::{ApprovalRequired, RunEvent, run_event};
use prost_types::Timestamp;
use tokio::sync::mpsc;

use super::Error;
use crate::approval::{self, Approvals, wanted::Wanted};

/// Tells the caller, and waits. Returns who has approved the run.
///
/// # Errors
/// [`Error::Approval`] and [`Error::Stopping`]: the run must not start.
pub(super) async fn wait(
    approvals: &Approvals,
    wanted: Wanted,
    caller: &mpsc::Sender<Result<RunEvent, Error>>,
) -> Result<String, Error> {
    let waiting = approvals.ask(wanted)?;
    let required = ApprovalRequired {
        approval_id: waiting.approval.id.to_string(),
        reason: waiting.approval.reason().into(),
        expires_at: Some(Timestamp::from(waiting.approval.expires_at)),
    };
    // It is the first event, so there is room. Nobody may listen.
    let _gone = caller.try_send(Ok(RunEvent {
        event: Some(run_event::Event::ApprovalRequired(required)),
    }));
    match waiting.approved().await {
        Ok(approved) => Ok(approved.decided_by),
        Err(approval::Error::Stopping) => Err(Error::Stopping),
        Err(error) => Err(error.into()),
    }
}
