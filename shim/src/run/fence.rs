//! A run that was tried before must not run twice: every node is asked whether it took
//! the run, and closed to every try but this one, also to what is still on its way there.

use std::time::Duration;

use futures_util::future::join_all;
use polydev_proto::node::{
    Ballot, FenceRequest, fence_response::Answer, node_service_client::NodeServiceClient,
};
use tokio::time::sleep;
use tonic::{Status, transport::Channel};

use super::{Error, answered};
use crate::pool::View;

/// Shims that try the same run at the same time overtake each other so often at most.
const ROUNDS: u32 = 10;

/// What the nodes know of a run.
#[derive(Debug)]
pub enum Fenced {
    /// This one has it.
    Have { node_id: String, channel: Channel },
    /// None has it, and none takes a claim of it but those above this ballot and with its
    /// nonce.
    All(Ballot),
}

/// Asks every node, and closes the run to all tries but that of `ballot`'s nonce.
///
/// # Errors
/// [`Error::MayHaveRun`] if a node cannot be asked or cannot tell, unless
/// `accept_duplicate`; [`Error::NotRun`] if others try the same run all the time.
pub async fn fence(
    view: &View,
    run_id: &str,
    mut ballot: Ballot,
    accept_duplicate: bool,
) -> Result<Fenced, Error> {
    for round in 1..=ROUNDS {
        let (nodes, mut unsure) = view.channels();
        if nodes.is_empty() {
            return Err(Error::NoNode);
        }
        ballot.attempt += 1;
        let asked = nodes.into_iter().map(async |(node_id, channel)| {
            let answer = ask(channel.clone(), run_id, ballot).await;
            (node_id, channel, answer)
        });
        let mut highest = ballot;
        for (node_id, channel, answer) in join_all(asked).await {
            match answer {
                Ok(Answer::Have(_)) => return Ok(Fenced::Have { node_id, channel }),
                Ok(Answer::Fenced(fence)) if order(&fence) > order(&highest) => highest = fence,
                Ok(Answer::Fenced(_)) => {}
                Ok(Answer::Unknown(_)) => unsure.push(node_id),
                Err(status) => {
                    tracing::info!(node_id, %status, "a node does not say whether it has a run");
                    unsure.push(node_id);
                }
            }
        }
        if !unsure.is_empty() && !accept_duplicate {
            return Err(Error::MayHaveRun { nodes: unsure });
        }
        if highest == ballot {
            return Ok(Fenced::All(ballot));
        }
        ballot.attempt = highest.attempt;
        sleep(Duration::from_millis(10 * u64::from(round)).mul_f64(rand::random())).await;
    }
    Err(Error::NotRun {
        reason: "other shims try the same run".into(),
    })
}

/// Asks one node.
///
/// # Errors
/// As the node or the wire says.
pub async fn ask(channel: Channel, run_id: &str, ballot: Ballot) -> Result<Answer, Status> {
    let request = FenceRequest {
        run_id: run_id.to_owned(),
        ballot: Some(ballot),
    };
    let mut client = NodeServiceClient::new(channel);
    let answer = answered(client.fence(request)).await?.into_inner().answer;
    answer.ok_or_else(|| Status::internal("an empty answer"))
}

fn order(ballot: &Ballot) -> (u64, u64) {
    (ballot.attempt, ballot.nonce)
}
