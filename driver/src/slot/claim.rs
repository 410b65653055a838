//! The decision about a claim of one slot.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use super::{
    Claim, Slot,
    headroom::{Amount, Share},
    state::Event,
};
use crate::{
    node::Node,
    run::{
        Run,
        book::{Admitted, Occupant},
        carry::Order,
        claim::{Parsed, Refusal},
        journal::Claimed,
        uptime,
    },
};

impl Slot {
    /// Decides about a claim of this slot, and hands it over. What becomes of it is for
    /// the run to tell.
    ///
    /// # Errors
    /// [`Refusal`]: nothing of it runs.
    pub(crate) fn claim(
        &self,
        node: &Node,
        generation: u64,
        parsed: Parsed,
        arrived: Instant,
        start_by: Instant,
    ) -> Result<Arc<Run>, Refusal> {
        let share_needed = Amount::on_top(&node.config.run, &self.idle);
        let run_id = &parsed.start.run_id;
        let mut share = None;
        let admitted = node.runs.admit(
            &parsed,
            arrived,
            || self.kill.child_token(),
            |write| {
                let room = |occupant: Occupant| {
                    // What a lease has taken is its run's.
                    let share = match self.has_leased_share() {
                        true => None,
                        false => Some(node.headroom.take(share_needed)?),
                    };
                    write(self.claimed(&parsed, generation, occupant, share_needed, node))?;
                    let share = share.or_else(|| self.leased_share());
                    Ok(share.expect("it was there, and the slot is locked"))
                };
                share = Some(self.grant(generation, run_id, &parsed.user_id, room)?);
                Ok(())
            },
        );
        let (run, inputs) = match admitted? {
            Admitted::Known(run) => return Ok(run),
            Admitted::New(run, inputs) => (run, inputs),
        };
        let claim = Claim {
            run: run.clone(),
            order: Order {
                start: parsed.start,
                start_by,
                inputs,
            },
            share: share.expect("what is admitted was granted its share"),
        };
        if self.claims.try_send(claim).is_err() {
            let reason = "the slot has ended".into();
            node.runs.aborted(&run, Refusal::Broken { reason });
        }
        Ok(run)
    }

    fn claimed(
        &self,
        parsed: &Parsed,
        generation: u64,
        occupant: Occupant,
        share: Amount,
        node: &Node,
    ) -> Claimed {
        Claimed {
            run_id: parsed.start.run_id.clone(),
            user_id: parsed.user_id.clone(),
            ballot: parsed.ballot,
            provider: self.config.provider.clone(),
            slot_id: self.identity.slot_id(),
            generation,
            spec_hash: parsed.spec_hash.clone(),
            claimed_at: SystemTime::now(),
            uptime: uptime(),
            timeout: parsed.timeout,
            kill_timeout: parsed.kill_timeout,
            drop_oldest: parsed.drop_oldest,
            files_bytes: parsed.files_bytes,
            on_demand: self.is_on_demand(),
            share,
            boot_id: node.runs.boot_id.clone(),
            container: occupant.container,
            pid: occupant.pid,
            pid_start: occupant.pid_start,
            link: occupant.link,
        }
    }

    /// Decides about a claim, once and for good: the only place where one is granted.
    ///
    /// # Errors
    /// [`Refusal`] if the slot is not idle at this generation, or `room` refuses; the slot is
    /// as it was.
    fn grant(
        &self,
        generation: u64,
        run_id: &str,
        user_id: &str,
        room: impl FnOnce(Occupant) -> Result<Share, Refusal>,
    ) -> Result<Share, Refusal> {
        let claimed = Event::Claimed {
            generation,
            run_id: run_id.to_owned(),
            user_id: user_id.to_owned(),
        };
        let life = self.lock();
        let mut next = life.clone();
        next.apply(claimed, SystemTime::now())
            .map_err(Refusal::Taken)?;
        let occupant = self.container().occupant.clone();
        let share = room(occupant.expect("an idle slot has a container"))?;
        self.step(life, next);
        Ok(share)
    }
}
