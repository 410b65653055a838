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
        let mut have = None;
        let mut answers = vec![Told::Unsure; unsure.len()];
        for (node_id, channel, answer) in join_all(asked).await {
            answers.push(match answer {
                Ok(Answer::Have(_)) => {
                    have = Some(Fenced::Have { node_id, channel });
                    Told::Have
                }
                Ok(Answer::Fenced(fence)) => Told::Fenced(order(&fence)),
                Ok(Answer::Unknown(_)) => {
                    unsure.push(node_id);
                    Told::Unsure
                }
                Err(status) => {
                    tracing::info!(node_id, %status, "a node does not say whether it has a run");
                    unsure.push(node_id);
                    Told::Unsure
                }
            });
        }
        match (settle(order(&ballot), &answers, accept_duplicate), have) {
            (Settled::Have, Some(have)) => return Ok(have),
            (Settled::All, _) => return Ok(Fenced::All(ballot)),
            (Settled::Overtaken { attempt }, _) => ballot.attempt = attempt,
            (Settled::Unsure | Settled::Have, _) => {
                return Err(Error::MayHaveRun { nodes: unsure });
            }
        }
        sleep(Duration::from_millis(10 * u64::from(round)).mul_f64(rand::random())).await;
    }
    Err(Error::NotRun {
        reason: "other shims try the same run".into(),
    })
}

/// One node's answer to a fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Told {
    Have,
    /// The highest ballot it was shown, as attempt and nonce.
    Fenced((u64, u64)),
    /// It cannot tell, or cannot be asked.
    Unsure,
}

/// What all answers to a fence come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    Have,
    /// It holds everywhere.
    All,
    /// Another fence was higher: it has to go above this attempt.
    Overtaken {
        attempt: u64,
    },
    Unsure,
}

/// Decides what a fence with `ballot` has come to. Pure: `tests/model` asks it too.
#[must_use]
pub fn settle(ballot: (u64, u64), answers: &[Told], accept_duplicate: bool) -> Settled {
    if answers.contains(&Told::Have) {
        return Settled::Have;
    }
    if answers.contains(&Told::Unsure) && !accept_duplicate {
        return Settled::Unsure;
    }
    let fences = answers.iter().filter_map(|told| match told {
        Told::Fenced(fence) => Some(*fence),
        Told::Have | Told::Unsure => None,
    });
    match fences.max() {
        Some(highest) if highest > ballot => Settled::Overtaken { attempt: highest.0 },
        _ => Settled::All,
    }
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
