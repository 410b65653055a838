//! Decodes the claims of shims.

use std::time::SystemTime;

use polydev_proto::{id::Generation, node::Claim};

use crate::{
    permits::Permits,
    run::claim::{self, Parsed, Refusal},
    slot::claim::Target,
};

/// # Errors
/// [`Refusal::Invalid`] with the field's name.
pub(super) fn decode(mut claim: Claim, permits: &Permits) -> Result<(Target, Parsed), Refusal> {
    // First: the token is over the claim as it came.
    let presented = permits.take(&mut claim);
    let start_by = claim.start_by.take();
    let target = Target {
        slot_id: std::mem::take(&mut claim.slot_id).into(),
        generation: Generation(claim.generation),
        start_id: std::mem::take(&mut claim.start_id),
        // A value that is not a valid time counts as past.
        start_by: start_by.and_then(|start_by| SystemTime::try_from(start_by).ok()),
    };
    let parsed = claim::parse(claim, presented)?;
    let (run_id, user_id) = (parsed.run_id, &parsed.user_id);
    tracing::debug!(%run_id, %user_id, slot_id = %target.slot_id, "claim");
    Ok((target, parsed))
}
