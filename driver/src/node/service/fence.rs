//! The requests of a try that asks whether its run is here.

use std::time::SystemTime;

use polydev_proto::{
    id::UserId,
    node::{FenceRequest, FenceResponse, HaveRun, OtherUser, Unknown, fence_response},
};
use tonic::Status;

use super::parse_id;
use crate::{
    node::Node,
    run::{book::Fenced, claim},
};

/// Nomad's node ids are UUIDs.
const MAX_NODE_ID: usize = 64;

/// Closes a run to all tries but one, and returns what is known of the run.
///
/// # Errors
/// INVALID_ARGUMENT names the field; UNAVAILABLE means that the run is not closed.
pub(super) fn fence(node: &Node, request: FenceRequest) -> Result<FenceResponse, Status> {
    let FenceRequest {
        run_id,
        ballot,
        claims_on,
        user_id,
    } = request;
    let ballot = ballot.ok_or_else(|| Status::invalid_argument("`ballot` is missing"))?;
    let run_id = parse_id(&run_id)?;
    claim::check_made(run_id, SystemTime::now())
        .map_err(|invalid| Status::invalid_argument(invalid.to_string()))?;
    if claims_on.len() > MAX_NODE_ID {
        let problem = format!("`claims_on` is longer than {MAX_NODE_ID} bytes");
        return Err(Status::invalid_argument(problem));
    }
    let newer = Some(claims_on).filter(|node_id| !node_id.is_empty());
    let user_id = Some(user_id).filter(|user_id| !user_id.is_empty());
    let user_id = user_id.map(UserId::from);
    let fenced = node.runs.fence(run_id, user_id, ballot.into(), newer);
    let fenced = fenced.map_err(|error| Status::unavailable(crate::chain(&error)))?;
    let mut claims_on = Vec::new();
    let answer = match fenced {
        Fenced::Have {
            slot_id,
            generation,
            ended,
        } => fence_response::Answer::Have(HaveRun {
            slot_id: slot_id.into(),
            generation: generation.0,
            ended,
        }),
        Fenced::Fenced {
            ballot,
            claims_on: told,
        } => {
            claims_on = told.into_iter().collect();
            fence_response::Answer::Fenced(ballot.into())
        }
        Fenced::OtherUser => fence_response::Answer::OtherUser(OtherUser {}),
        Fenced::Unknown { is_newer } => fence_response::Answer::Unknown(Unknown { is_newer }),
    };
    Ok(FenceResponse {
        answer: Some(answer),
        claims_on,
    })
}
