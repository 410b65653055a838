//! Decodes the lease requests of shims.

use std::time::SystemTime;

use polydev_proto::{id::Generation, node::LeaseRequest};

use crate::{
    run::claim::{self, Refusal},
    slot::lease::Wanted,
};

/// # Errors
/// [`Refusal::Invalid`] with the field's name.
pub(super) fn decode(request: LeaseRequest) -> Result<Wanted, Refusal> {
    let LeaseRequest {
        run_id,
        slot_id,
        generation,
        start_id,
        user_id,
        time,
    } = request;
    let run_id = claim::run_id(&run_id)?;
    claim::check_age(run_id, SystemTime::now())?;
    Ok(Wanted {
        slot_id: slot_id.into(),
        generation: Generation(generation),
        start_id,
        run_id,
        user_id: user_id.into(),
        time: claim::lease_time(time)?,
    })
}
