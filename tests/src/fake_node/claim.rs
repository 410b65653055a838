//! A claim on a node that keeps its runs.

use std::{sync::Arc, time::SystemTime};

use polydev_proto::node::{Claim, Slot};
use tonic::Status;

use super::{
    Asked, Loss, Node,
    book::Claimed,
    lock,
    run::Run,
    slots::{START_ID, not_idle},
};

impl Node {
    /// Records a request, if the node keeps requests.
    pub(super) fn note(&self, note: impl FnOnce(&mut Asked)) {
        if self.keeps {
            note(&mut lock(&self.asked));
        }
    }

    /// The run of a claim. A new run starts.
    pub(super) fn claimed(&self, claim: Claim) -> Result<Arc<Run>, Status> {
        self.note(|asked| asked.claims.push(claim.clone()));
        let loss = self.knobs.loss();
        let lost = || {
            self.knobs.break_connections();
            Status::unavailable("the answer is lost")
        };
        if loss == Some(Loss::NotTaken) {
            return Err(lost());
        }
        let run = match self.book.claim(claim, |claim| self.slot_of(claim))? {
            Claimed::Known(run) => run,
            Claimed::New(run) => {
                let (slots, running) = (self.slots.clone(), run.clone());
                tokio::spawn(async move {
                    running.execute().await;
                    slots.refill(running.slot.slot_id.clone());
                });
                run
            }
        };
        match loss {
            Some(Loss::Taken) => Err(lost()),
            _ => Ok(run),
        }
    }

    fn slot_of(&self, claim: &Claim) -> Result<Slot, Status> {
        self.knobs.refusal()?;
        if claim.start_id != START_ID {
            return Err(Status::failed_precondition("another start of the driver"));
        }
        let start_by = claim.start_by.and_then(|by| SystemTime::try_from(by).ok());
        if start_by.is_none_or(|by| by < SystemTime::now()) {
            return Err(Status::failed_precondition(
                "the claim came too late to start",
            ));
        }
        if !self.slots.take(claim) {
            return Err(not_idle());
        }
        self.slots.find(&claim.slot_id).ok_or_else(not_idle)
    }
}
