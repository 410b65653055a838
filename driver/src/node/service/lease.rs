//! Leases, as shims ask for them.

use std::time::SystemTime;

use polydev_proto::node::{LeaseRequest, LeaseResponse, ReleaseRequest, ReleaseResponse};
use prost_types::Timestamp;

use crate::{
    node::Node,
    run::{
        book::NotFound,
        claim::{self, Refusal},
    },
};

/// # Errors
/// [`Refusal`]
pub(super) fn lease(node: &Node, request: LeaseRequest) -> Result<LeaseResponse, Refusal> {
    let LeaseRequest {
        run_id,
        slot_id,
        generation,
        start_id,
        user_id,
        time,
    } = request;
    claim::check_age(&run_id, SystemTime::now())?;
    let time = claim::lease_time(time)?;
    if start_id != node.start_id {
        let (given, actual) = (start_id, node.start_id.clone());
        return Err(Refusal::OtherStart { given, actual });
    }
    let slot = node.slots.by_slot_id(&slot_id);
    let slot = slot.ok_or(Refusal::UnknownSlot { slot_id })?;
    let until = slot.lease(node, generation, &run_id, &user_id, time)?;
    let expires_at = Some(Timestamp::from(until));
    Ok(LeaseResponse { expires_at })
}

/// # Errors
/// [`NotFound`]
pub(super) fn release(node: &Node, request: ReleaseRequest) -> Result<ReleaseResponse, NotFound> {
    let ReleaseRequest { run_id, user_id } = request;
    for slot in node.slots.all() {
        match slot.release(&run_id, &user_id) {
            Err(NotFound::Unknown { .. }) => {}
            released => return released.map(|()| ReleaseResponse {}),
        }
    }
    Err(NotFound::Unknown { run_id })
}
