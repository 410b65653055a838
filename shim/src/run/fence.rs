//! A run must not run twice. Before a retry every node is asked whether it took the run, and
//! closed to every try but this one, also to what is still on its way there: [`fence`]. A node
//! that is newer than the run knows nothing of other tries: before a claim there the others are
//! asked, and told of it, by [`announce`].

use std::{collections::BTreeSet, time::Duration};

use futures_util::future::join_all;
use polydev_proto::node::{
    Ballot, FenceRequest, FenceResponse, Unknown, fence_response::Answer,
    node_service_client::NodeServiceClient,
};
use tokio::time::sleep;
use tonic::{Status, transport::Channel};

use super::{Error, answered};
use crate::pool::View;

/// Shims that try the same run at the same time overtake each other so often at most.
const ROUNDS: u32 = 10;

/// A node that has the run.
#[derive(Debug)]
pub struct Have {
    pub node_id: String,
    pub channel: Channel,
}

/// What the nodes know of a run.
#[derive(Debug)]
pub enum Fenced {
    /// This one has it.
    Have(Have),
    /// None has it, and none takes a claim of it but those above this ballot and with its
    /// nonce.
    All(Ballot),
}

/// What the other nodes know of a run that goes to a newer one.
#[derive(Debug)]
pub enum Announced {
    /// This one has it.
    Have(Have),
    /// None knows of another try, and one that comes later is told of the newer node.
    Alone,
    /// Another try was here.
    Overtaken,
    /// These are all the others, and none of them can tell.
    Nobody { nodes: Vec<String> },
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
        let (nodes, unreachable) = view.channels();
        if nodes.is_empty() {
            return Err(Error::NoNode);
        }
        let asked: BTreeSet<String> = nodes.iter().map(|(node_id, _)| node_id.clone()).collect();
        ballot.attempt += 1;
        let mut answers = ask_all(nodes, unreachable, run_id, ballot, "").await;
        let elsewhere = std::mem::take(&mut answers.went_to);
        let unasked = elsewhere
            .into_iter()
            .filter(|node_id| !asked.contains(node_id));
        let newer = std::mem::take(&mut answers.newer);
        for node_id in unasked.chain(newer) {
            answers.unsure(node_id);
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
        reason: "other shims try the same run".into(),
    })
}

/// Asks every one of these nodes but the newer one, which the try with this nonce is to claim on
/// next, and tells them of it. One that is not newer itself is enough: another try has to ask
/// it too, before or after.
pub async fn announce(
    (mut nodes, unreachable): (Vec<(String, Channel)>, Vec<String>),
    run_id: &str,
    nonce: u64,
    newer: &str,
) -> Announced {
    nodes.retain(|(node_id, _)| node_id != newer);
    // Above no other: whoever was here is seen.
    let ballot = Ballot { attempt: 0, nonce };
    let answers = ask_all(nodes, unreachable, run_id, ballot, newer).await;
    match (alone(nonce, &answers.told), answers.have) {
        (Alone::Have, Some(have)) => Announced::Have(have),
        (Alone::Yes, _) => Announced::Alone,
        (Alone::Overtaken, _) => Announced::Overtaken,
        (Alone::Unsure | Alone::Have, _) => Announced::Nobody {
            nodes: answers.unsure,
        },
    }
}

/// What came of a question to all nodes.
#[derive(Default)]
struct Answers {
    told: Vec<Told>,
    /// The one that answers so.
    have: Option<Have>,
    /// Those that cannot tell.
    unsure: Vec<String>,
    /// Those that are newer than the run themselves.
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
    run_id: &str,
    ballot: Ballot,
    claims_on: &str,
) -> Answers {
    let asked = nodes.into_iter().map(async |(node_id, channel)| {
        let answer = ask(channel.clone(), run_id, ballot, claims_on).await;
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
            Ok((Answer::Unknown(Unknown { is_newer: true }), _)) => answers.newer.push(node_id),
            Ok((Answer::Unknown(_), _)) => answers.unsure(node_id),
            Err(status) => {
                tracing::info!(node_id, %status, "a node does not say whether it has a run");
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

/// Whether a try may claim on a node that is newer than its run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alone {
    Yes,
    Have,
    Overtaken,
    Unsure,
}

/// Decides what the answers of all other nodes but the newer ones come to for the try with
/// `nonce`. Pure: `tests/model` asks it too.
#[must_use]
pub fn alone(nonce: u64, answers: &[Told]) -> Alone {
    let is_others = |told: &Told| matches!(told, Told::Fenced((_, other)) if *other != nonce);
    if answers.contains(&Told::Have) {
        Alone::Have
    } else if answers.iter().any(is_others) {
        Alone::Overtaken
    } else if answers.is_empty() || answers.iter().any(|told| *told != Told::Unsure) {
        Alone::Yes
    } else {
        Alone::Unsure
    }
}

/// Asks one node, and tells it of the newer one that the try goes to, if `claims_on` names one;
/// the second of the answer is the newer nodes that it was told of.
///
/// # Errors
/// As the node or the wire says.
pub async fn ask(
    channel: Channel,
    run_id: &str,
    ballot: Ballot,
    claims_on: &str,
) -> Result<(Answer, Vec<String>), Status> {
    let request = FenceRequest {
        run_id: run_id.to_owned(),
        ballot: Some(ballot),
        claims_on: claims_on.to_owned(),
    };
    let mut client = NodeServiceClient::new(channel);
    let response = answered(client.fence(request)).await?.into_inner();
    let FenceResponse { answer, claims_on } = response;
    let answer = answer.ok_or_else(|| Status::internal("an empty answer"))?;
    Ok((answer, claims_on))
}

fn order(ballot: &Ballot) -> (u64, u64) {
    (ballot.attempt, ballot.nonce)
}
