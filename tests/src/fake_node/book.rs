//! The runs of a node, and what the node knows of other run ids. The driver's own [`Standing`]
//! decides the result of a claim and of a fence.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use polydev_driver::run::{
    Ballot,
    standing::{OnClaim, OnFence, Standing},
};
use polydev_proto::{
    id::RunId,
    node::{
        self, Claim, FenceRequest, FenceResponse, HaveRun, ListRunsRequest, OtherUser, Slot,
        Unknown, fence_response::Answer,
    },
};
use prost::Message;
use tokio::sync::broadcast;
use tonic::Status;

use super::{lock, run::Run};

/// How many steps of runs may wait for a watcher.
const STEPS: usize = 64;

/// The command of a claim, and its user.
type Spec = Vec<u8>;

pub(super) struct Book {
    known: Mutex<HashMap<String, Known>>,
    since: Option<SystemTime>,
    unsure: AtomicBool,
    steps: broadcast::Sender<String>,
}

enum Known {
    Run(Arc<Run>),
    Fenced(Fence),
}

#[derive(Clone, Default)]
struct Fence {
    user_id: String,
    ballot: Ballot,
    claims_on: BTreeSet<String>,
    /// A claim of the run was given up.
    aborted: bool,
}

/// The answer to a claim that is not refused.
pub(super) enum Claimed {
    New(Arc<Run>),
    /// The run was claimed before.
    Known(Arc<Run>),
}

fn spec(claim: &Claim) -> Spec {
    let mut bytes = claim.user_id.clone().into_bytes();
    bytes.extend(claim.spec.iter().flat_map(Message::encode_to_vec));
    bytes
}

fn ballot(given: Option<node::Ballot>) -> Ballot {
    given.unwrap_or_default().into()
}

impl Known {
    fn is_others(&self, user_id: &str) -> bool {
        let own = match self {
            Self::Run(run) => &run.claim.user_id,
            Self::Fenced(fence) => &fence.user_id,
        };
        own != user_id
    }

    fn standing(&self, user_id: &str) -> Standing<Spec> {
        match self {
            _ if self.is_others(user_id) => Standing::OtherUser,
            Self::Run(run) => Standing::Ran {
                spec: spec(&run.claim),
                kept: true,
            },
            Self::Fenced(fence) => Standing::Fenced(fence.ballot),
        }
    }
}

impl Book {
    pub(super) fn new(since: Option<SystemTime>) -> Self {
        Self {
            known: Mutex::default(),
            since,
            unsure: AtomicBool::new(false),
            steps: broadcast::Sender::new(STEPS),
        }
    }

    /// The run of a claim, in the slot that `take` returns.
    ///
    /// # Errors
    /// The driver's, or those of `take`.
    pub(super) fn claim(
        &self,
        claim: Claim,
        take: impl FnOnce(&Claim) -> Result<Slot, Status>,
    ) -> Result<Claimed, Status> {
        let mut known = lock(&self.known);
        let before = known.get(&claim.run_id);
        let standing = before.map(|known| known.standing(&claim.user_id));
        let given = ballot(claim.ballot);
        let decided = Standing::on_claim(standing.as_ref(), &spec(&claim), given);
        match (decided, before) {
            (OnClaim::Take, _) => {}
            (OnClaim::Repeat, Some(Known::Run(run))) => return Ok(Claimed::Known(run.clone())),
            (OnClaim::Fenced(_), _) => return Err(Status::aborted("another try stands before it")),
            (OnClaim::OtherUser, _) => {
                return Err(Status::aborted("`run_id` is another user's here"));
            }
            _ => return Err(Status::already_exists("`run_id` is another command's")),
        }
        let slot = take(&claim)?;
        let run_id = claim.run_id.clone();
        let run = Arc::new(Run::new(claim, slot, self.steps.clone()));
        known.insert(run_id, Known::Run(run.clone()));
        Ok(Claimed::New(run))
    }

    /// Closes a run to all tries but one, unless the node has the run.
    pub(super) fn fence(&self, request: &FenceRequest) -> FenceResponse {
        let mut known = lock(&self.known);
        let before = known.get(&request.run_id);
        let is_others = before.is_some_and(|known| known.is_others(&request.user_id));
        if (before.is_none() || is_others)
            && let Some(unknown) = self.may_have_forgotten(&request.run_id)
        {
            return FenceResponse {
                answer: Some(Answer::Unknown(unknown)),
                ..FenceResponse::default()
            };
        }
        if is_others {
            return FenceResponse {
                answer: Some(Answer::OtherUser(OtherUser {})),
                ..FenceResponse::default()
            };
        }
        if let Some(Known::Run(run)) = before {
            let have = HaveRun {
                slot_id: run.slot.slot_id.clone(),
                generation: run.slot.generation,
                ended: run.progress.borrow().ended.is_some(),
            };
            return FenceResponse {
                answer: Some(Answer::Have(have)),
                ..FenceResponse::default()
            };
        }
        let mut fence = match before {
            Some(Known::Fenced(fence)) => fence.clone(),
            _ => Fence {
                user_id: request.user_id.clone(),
                ..Fence::default()
            },
        };
        let standing = before.map(|known| known.standing(&request.user_id));
        let given = ballot(request.ballot);
        if let OnFence::Fenced(highest) = Standing::on_fence(standing.as_ref(), given) {
            fence.ballot = highest;
        }
        let newer = Some(request.claims_on.clone());
        fence.claims_on.extend(newer.filter(|id| !id.is_empty()));
        let response = FenceResponse {
            answer: Some(Answer::Fenced(fence.ballot.into())),
            claims_on: fence.claims_on.iter().cloned().collect(),
        };
        known.insert(request.run_id.clone(), Known::Fenced(fence));
        response
    }

    fn may_have_forgotten(&self, run_id: &str) -> Option<Unknown> {
        let made = run_id.parse().map(RunId::made_at).ok();
        let is_newer = self
            .since
            .is_some_and(|since| made.is_none_or(|made| made < since));
        let is_unsure = self.unsure.load(Ordering::SeqCst);
        (is_newer || is_unsure).then_some(Unknown { is_newer })
    }

    /// `None` is the operator.
    ///
    /// # Errors
    /// As the driver's.
    pub(super) fn find(&self, run_id: &str, user_id: Option<&str>) -> Result<Arc<Run>, Status> {
        match lock(&self.known).get(run_id) {
            Some(Known::Run(run)) => match user_id {
                Some(user_id) if run.claim.user_id != user_id => {
                    let words = format!("run `{run_id}` is another user's");
                    Err(Status::permission_denied(words))
                }
                _ => Ok(run.clone()),
            },
            Some(Known::Fenced(fence)) if fence.aborted => {
                let words = format!("run `{run_id}` was claimed and not started");
                Err(Status::failed_precondition(words))
            }
            Some(Known::Fenced(_)) | None => {
                let words = format!("this node has no run `{run_id}`");
                Err(Status::not_found(words))
            }
        }
    }

    pub(super) fn forget(&self, run_id: &str) {
        lock(&self.known).remove(run_id);
    }

    pub(super) fn be_unsure(&self) {
        self.unsure.store(true, Ordering::SeqCst);
    }

    pub(super) fn give_up(&self, run_id: &str) {
        let mut known = lock(&self.known);
        let run = match known.get(run_id) {
            Some(Known::Run(run)) => run.clone(),
            _ => return,
        };
        let fence = Fence {
            user_id: run.claim.user_id.clone(),
            ballot: ballot(run.claim.ballot),
            aborted: true,
            ..Fence::default()
        };
        known.insert(run_id.to_owned(), Known::Fenced(fence));
        drop(known);
        run.give_up();
    }

    /// The runs that match, the newest first.
    pub(super) fn list(&self, request: &ListRunsRequest) -> Vec<node::Run> {
        let ListRunsRequest {
            user_id,
            provider,
            states,
            before_run_id,
            limit,
        } = request;
        let fits = |run: &node::Run| {
            (user_id.is_empty() || run.user_id == *user_id)
                && (provider.is_empty() || run.provider == *provider)
                && (states.is_empty() || states.contains(&run.state))
                && (before_run_id.is_empty() || run.run_id < *before_run_id)
        };
        let mut runs: Vec<_> = self.all().into_iter().filter(fits).collect();
        runs.sort_by(|a, b| b.run_id.cmp(&a.run_id));
        runs.truncate(usize::try_from(*limit).unwrap_or(usize::MAX));
        runs
    }

    /// All runs, in no order.
    pub(super) fn all(&self) -> Vec<node::Run> {
        let known = lock(&self.known);
        let runs = known.values().filter_map(|known| match known {
            Known::Run(run) => Some(run.describe()),
            Known::Fenced(_) => None,
        });
        runs.collect()
    }

    /// The id of each run that makes a step.
    pub(super) fn steps(&self) -> broadcast::Receiver<String> {
        self.steps.subscribe()
    }
}
