//! The answer of a node that keeps nothing, so that a thousand nodes are cheap.

use futures_util::{StreamExt, stream};
use polydev_proto::node::{
    Attached, Claim, ClaimResponse, Ended, Granted, RunEvent, Started, ended, run_event::Event,
};
use tonic::Status;

use super::{Node, service::Responses, slots::not_idle};

/// The program of a run that never ends.
const WAIT: &[u8] = b"wait";

/// Grants a slot to a run that ends at once, or never.
///
/// # Errors
/// FAILED_PRECONDITION if the slot is not idle.
pub(super) fn answer(node: &Node, claim: Claim) -> Result<Responses<ClaimResponse>, Status> {
    if !node.slots.take(&claim) {
        return Err(not_idle());
    }
    let program = claim.spec.as_ref().and_then(|spec| spec.argv.first());
    let waits = program.is_some_and(|program| *program == WAIT);
    if !waits {
        node.slots.refill(claim.slot_id.clone());
    }
    let attached = Attached {
        slot_id: claim.slot_id,
        generation: claim.generation,
        ..Attached::default()
    };
    let ended = Ended {
        reason: ended::Reason::Exited.into(),
        ..Ended::default()
    };
    let events = [
        Event::Attached(attached),
        Event::Granted(Granted::default()),
        Event::Started(Started::default()),
        Event::Ended(ended),
    ];
    let events = events.map(|event| {
        Ok(ClaimResponse {
            event: Some(RunEvent { event: Some(event) }),
        })
    });
    if waits {
        let events = stream::iter(events.into_iter().take(3));
        return Ok(Box::pin(events.chain(stream::pending())));
    }
    Ok(Box::pin(stream::iter(events)))
}
