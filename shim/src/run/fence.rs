//! Makes sure that no run runs twice. Before a retry, [`fence`] asks every node whether it took
//! the run, and closes the node to every other try, even to claims that are still on their way.
//! A node that is newer than the run knows nothing about other tries. Before a claim there,
//! [`announce`] asks the other nodes and reports the claim to them.

use std::{collections::BTreeSet, time::Duration};

use futures_util::future::join_all;
use polydev_proto::{
    id::{RunId, UserId},
    node::{
        Ballot, FenceRequest, FenceResponse, Unknown, fence_response::Answer,
        node_service_client::NodeServiceClient,
    },
};
use tokio::time::sleep;
use tonic::{Status, transport::Channel};

use super::{Error, answered};
use crate::pool::View;

/// How often shims that try the same run at the same time may overtake each other.
const MAX_ROUNDS: u32 = 10;

/// A node that has the run.
#[derive(Debug)]
pub struct Have {
    pub node_id: String,
    pub channel: Channel,
}

/// What the nodes know about a run.
#[derive(Debug)]
pub enum Fenced {
    /// This node has the run.
    Have(Have),
    /// No node has the run. All nodes accept only claims above this ballot and with its nonce.
    All(Ballot),
}

/// What the other nodes know about a run that goes to a newer node.
#[derive(Debug)]
pub enum Announced {
    /// This node has the run.
    Have(Have),
    /// No node knows another try. A later try learns about the newer node.
    Alone,
    /// Another try asked these nodes before.
    Overtaken,
    /// These are all other nodes, and none of them can tell.
    Nobody { nodes: Vec<String> },
}

/// Asks every node, and closes the run to all tries except the one with `ballot`'s nonce.
///
/// # Errors
/// [`Error::MayHaveRun`] if a node cannot be asked or cannot tell, unless `accept_duplicate` is
/// set; [`Error::NotRun`] if other shims keep trying the same run.
pub async fn fence(
    view: &View,
    run: (RunId, &UserId),
    mut ballot: Ballot,
    accept_duplicate: bool,
) -> Result<Fenced, Error> {
    for round in 1..=MAX_ROUNDS {
        let (nodes, unreachable) = view.channels();
        if nodes.is_empty() {
            return Err(Error::NoNode);
        }
        let asked: BTreeSet<String> = nodes.iter().map(|(node_id, _)| node_id.clone()).collect();
        ballot.attempt += 1;
        let mut answers = ask_all(nodes, unreachable, run, ballot, "").await;
        let elsewhere = std::mem::take(&mut answers.went_to);
        let unasked = elsewhere
            .into_iter()
            .filter(|node_id| !asked.contains(node_id));
        let newer = std::mem::take(&mut answers.newer);
        for node_id in unasked.chain(newer) {
            answers.unsure(node_id);
        }
        // No other node can have the run.
        let all_are_asked = answers.unsure.is_empty() || accept_duplicate;
        if all_are_asked && answers.others.len() == asked.len() {
            let (run_id, user_id) = (run.0, run.1.clone());
            return Err(Error::Forbidden { run_id, user_id });
        }
        let settled = settle(order(&ballot), &answers.told, accept_duplicate);
        match (settled, answers.have) {
            (Settled::Have, Some(have)) => return Ok(Fenced::Have(have)),
            (Settled::All, _) => return Ok(Fenced::All(ballot)),
            (Settled::Overtaken { attempt }, _) => ballot.attempt = attempt,
            (Settled::Unsure | Settled::Have, _) => {
                let nodes = answers.unsure;
                return Err(Error::MayHaveRun { nodes });
            }
        }
        sleep(Duration::from_millis(10 * u64::from(round)).mul_f64(rand::random())).await;
    }
    Err(Error::NotRun {
        reason: "other shims are trying the same run".into(),
    })
}

/// Prepares a claim on `newer`, a node that is newer than the run. Asks all other nodes whether
/// they know another try than the one with this `nonce`, and reports `newer` to them. The answer of
/// one node that is not newer than the run is enough: every other try asks that node too. If the
/// other try asked first, this answer shows that try. If it asks later, it learns about `newer`.
pub async fn announce(
    (mut nodes, unreachable): (Vec<(String, Channel)>, Vec<String>),
    run: (RunId, &UserId),
    nonce: u64,
    newer: &str,
) -> Announced {
    nodes.retain(|(node_id, _)| node_id != newer);
    // This ballot is above no other, so the answers show every other try.
    let ballot = Ballot { attempt: 0, nonce };
    let mut answers = ask_all(nodes, unreachable, run, ballot, newer).await;
    match (alone(nonce, &answers.told), answers.have) {
        (Alone::Have, Some(have)) => Announced::Have(have),
        (Alone::Yes, _) => Announced::Alone,
        (Alone::Overtaken, _) => Announced::Overtaken,
        (Alone::Unsure | Alone::Have, _) => {
            answers.unsure.append(&mut answers.others);
            Announced::Nobody {
                nodes: answers.unsure,
            }
        }
    }
}

/// The answers of all nodes.
#[derive(Default)]
struct Answers {
    told: Vec<Told>,
    /// The node that has the run.
    have: Option<Have>,
    /// Nodes that cannot tell.
    unsure: Vec<String>,
    /// Nodes where another user's run has the id.
    others: Vec<String>,
    /// Nodes that are newer than the run.
    newer: Vec<String>,
    /// The newer nodes that other tries went to.
    went_to: BTreeSet<String>,
}

impl Answers {
    fn unsure(&mut self, node_id: String) {
        self.told.push(Told::Unsure);
        self.unsure.push(node_id);
    }
}

async fn ask_all(
    nodes: Vec<(String, Channel)>,
    unreachable: Vec<String>,
    run: (RunId, &UserId),
    ballot: Ballot,
    claims_on: &str,
) -> Answers {
    let asked = nodes.into_iter().map(async |(node_id, channel)| {
        let answer = ask(channel.clone(), run, ballot, claims_on).await;
        (node_id, channel, answer)
    });
    let mut answers = Answers::default();
    unreachable
        .into_iter()
        .for_each(|node_id| answers.unsure(node_id));
    for (node_id, channel, answer) in join_all(asked).await {
        match answer {
            Ok((Answer::Have(_), _)) => {
                answers.told.push(Told::Have);
                answers.have = Some(Have { node_id, channel });
            }
            Ok((Answer::Fenced(fence), went_to)) => {
                answers.told.push(Told::Fenced(order(&fence)));
                answers.went_to.extend(went_to);
            }
            Ok((Answer::OtherUser(_), _)) => {
                answers.told.push(Told::OtherUser);
                answers.others.push(node_id);
            }
            Ok((Answer::Unknown(Unknown { is_newer: true }), _)) => answers.newer.push(node_id),
            Ok((Answer::Unknown(_), _)) => answers.unsure(node_id),
            Err(status) => {
                tracing::info!(node_id, %status, "cannot ask a node whether it has a run");
                answers.unsure(node_id);
            }
        }
    }
    answers
}

/// One node's answer to a fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Told {
    Have,
    /// The highest ballot that the node has seen, as attempt and nonce.
    Fenced((u64, u64)),
    /// Another user's run has the id there: the run is not on the node, and never will be.
    OtherUser,
    /// The node cannot tell, or cannot be asked.
    Unsure,
}

/// The result of all answers to a fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    Have,
    /// The fence holds on all nodes.
    All,
    /// Another fence was higher. The next fence must go above this attempt.
    Overtaken {
        attempt: u64,
    },
    Unsure,
}

/// Decides the result of a fence with `ballot`. Pure: `tests/model` calls it too.
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
        Told::Have | Told::OtherUser | Told::Unsure => None,
    });
    match fences.max() {
        Some(highest) if highest > ballot => Settled::Overtaken { attempt: highest.0 },
        _ => Settled::All,
    }
}

/// Whether a try may claim on a node that is newer than its run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alone {
    Yes,
    Have,
    Overtaken,
    Unsure,
}

/// Decides the result for the try with `nonce` from the answers of all other nodes that are not
/// newer. A node that has another user's run of this id remembers nothing for this one. Pure:
/// `tests/model` calls it too.
#[must_use]
pub fn alone(nonce: u64, answers: &[Told]) -> Alone {
    let is_others = |told: &Told| matches!(told, Told::Fenced((_, other)) if *other != nonce);
    if answers.contains(&Told::Have) {
        Alone::Have
    } else if answers.iter().any(is_others) {
        Alone::Overtaken
    } else if answers.is_empty() || answers.iter().any(|told| matches!(told, Told::Fenced(_))) {
        Alone::Yes
    } else {
        Alone::Unsure
    }
}

/// Asks one node. If `claims_on` names the newer node that the try goes to, reports it to the node.
/// The second part of the result is the newer nodes that were reported to the node before.
///
/// # Errors
/// The status of the node or of the connection.
pub async fn ask(
    channel: Channel,
    (run_id, user_id): (RunId, &UserId),
    ballot: Ballot,
    claims_on: &str,
) -> Result<(Answer, Vec<String>), Status> {
    let request = FenceRequest {
        run_id: run_id.into(),
        ballot: Some(ballot),
        claims_on: claims_on.to_owned(),
        user_id: user_id.to_string(),
    };
    let mut client = NodeServiceClient::new(channel);
    let response = answered(client.fence(request)).await?.into_inner();
    let FenceResponse { answer, claims_on } = response;
    let answer = answer.ok_or_else(|| Status::internal("the driver's answer is empty"))?;
    Ok((answer, claims_on))
}

fn order(ballot: &Ballot) -> (u64, u64) {
    (ballot.attempt, ballot.nonce)
}
