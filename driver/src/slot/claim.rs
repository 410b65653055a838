//! A claim of a slot, from the request to the run. Read [`Slots::claim`] downwards.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use parking_lot::MutexGuard;
use polydev_proto::{
    execution::Permit,
    id::{Generation, SlotId},
};

use super::{Claim, Slot, Slots};
use crate::{
    headroom::{Amount, Share},
    life::{Event, Life},
    link::Occupant,
    run::{
        Run,
        book::Admit,
        carry::Order,
        claim::{self, Parsed, Refusal},
        journal::Claimed,
        uptime,
    },
};

/// The container that a shim claims, and its deadline.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) slot_id: SlotId,
    pub(crate) generation: Generation,
    /// The start of the driver that the shim saw.
    pub(crate) start_id: String,
    /// The command must not start after this time.
    pub(crate) start_by: Option<SystemTime>,
}

impl Slots {
    /// Decides finally about a claim, and hands the run to its slot. This is the only place
    /// that grants claims. `arrived` is zero of the run's timeline.
    ///
    /// Locks first the book of runs, then the life of the slot. Both stay locked until the
    /// claim is in the journal and the slot has taken its step.
    ///
    /// # Errors
    /// [`Refusal`], which is final: nothing of the command runs.
    pub(crate) fn claim(
        &self,
        target: Target,
        mut parsed: Parsed,
        arrived: Instant,
    ) -> Result<Arc<Run>, Refusal> {
        // A claim whose run is known here gets that run, whatever has changed since.
        if let Some(run) = self.runs.repeated(&parsed)? {
            return Ok(run);
        }
        let (slot, start_by) = self.find(&target, arrived)?;
        let (image, egress) = (&slot.config.image, slot.told_egress());
        let permits = &self.site.permits;
        let permit = permits.check(&parsed.presented, image, egress.as_ref())?;
        let of_role = parsed
            .policy
            .as_ref()
            .and_then(|policy| policy.egress.as_ref());
        let reachable = of_role.or(egress.as_ref());
        parsed.start.reaches = reachable.is_none_or(|egress| !egress.allow.is_empty());

        let admission = match self.runs.admit(&parsed)? {
            Admit::Known(run) => return Ok(run),
            Admit::New(admission) => admission,
        };
        let grant = slot.grant(self, target.generation, &parsed)?;
        let written = admission.write(grant.claimed(&parsed, permit, &self.runs.boot_id))?;
        let share = grant.commit();
        let (run, inputs) = written.enter(arrived, slot.kill.child_token());

        let order = Order {
            start: parsed.start,
            sealed_keys: parsed.sealed_keys,
            policy: parsed.policy,
            start_by,
            inputs,
        };
        self.hand_over(&slot, run.clone(), order, share);
        Ok(run)
    }

    /// The claimed slot, and the latest time at which its command may start.
    fn find(&self, target: &Target, arrived: Instant) -> Result<(Arc<Slot>, Instant), Refusal> {
        self.check_start(&target.start_id)?;
        // By this driver's clock, which the shim has received.
        let left = target
            .start_by
            .and_then(|until| until.duration_since(SystemTime::now()).ok())
            .ok_or(Refusal::TooLate)?;
        Ok((self.live(&target.slot_id)?, arrived + left))
    }
}

/// The right to a slot's idle container, with the slot's life locked. It has no effect
/// without [`Grant::commit`].
struct Grant<'a> {
    slot: &'a Slot,
    life: MutexGuard<'a, Life>,
    next: Life,
    occupant: Occupant,
    needed: Amount,
    /// `None` if the slot's lease already holds it.
    share: Option<Share>,
}

impl Slot {
    /// # Errors
    /// [`Refusal`] if the slot is not idle at this generation, or the node has no room for
    /// the run; nothing has changed.
    fn grant(
        &self,
        slots: &Slots,
        generation: Generation,
        parsed: &Parsed,
    ) -> Result<Grant<'_>, Refusal> {
        let needs_broker = !self.has_network();
        if let Some(reason) = self.unguarded(&slots.site) {
            return Err(Refusal::Unguarded { reason });
        }
        let policy = parsed.policy.as_ref();
        // Shims choose other slots for such runs.
        if !needs_broker && policy.is_some_and(|policy| policy.egress.is_some()) {
            return Err(claim::not_restricted().into());
        }
        if needs_broker && slots.site.broker.public_key().is_empty() {
            return Err(Refusal::NoBroker);
        }
        let claimed = Event::Claimed {
            generation,
            run_id: parsed.run_id,
            user_id: parsed.user_id.clone(),
        };
        let life = self.lock();
        let mut next = life.clone();
        next.apply(claimed, SystemTime::now())
            .map_err(Refusal::Taken)?;
        let occupant = self.container.lock().occupant.clone();
        let needed = Amount::on_top(&slots.site.config.class(self.config.provider), &self.idle);
        let share = match self.has_leased_share() {
            true => None,
            false => Some(slots.headroom.take(needed)?),
        };
        Ok(Grant {
            slot: self,
            life,
            next,
            occupant: occupant.expect("an idle slot has a container"),
            needed,
            share,
        })
    }
}

impl Grant<'_> {
    /// The journal's record of the claimed run.
    fn claimed(&self, parsed: &Parsed, permit: Option<Permit>, boot_id: &str) -> Claimed {
        let (slot, occupant) = (self.slot, self.occupant.clone());
        Claimed {
            run_id: parsed.run_id,
            user_id: parsed.user_id.clone(),
            caller_user: match slot.config.tool_policy {
                true => parsed.caller_user.clone(),
                false => String::new(),
            },
            caller: match slot.config.tool_policy {
                true => parsed.caller.clone(),
                false => String::new(),
            },
            ballot: parsed.ballot,
            provider: slot.config.provider.to_string(),
            slot_id: slot.identity.slot_id(),
            generation: self.next.generation(),
            spec_hash: parsed.spec_hash.clone(),
            token: permit,
            claimed_at: SystemTime::now(),
            uptime: uptime(),
            timeout: parsed.timeout,
            kill_timeout: parsed.kill_timeout,
            max_api_wait: parsed.max_api_wait,
            keeps_on: !slot.config.end_on_refused_key,
            drop_oldest: parsed.drop_oldest,
            files_bytes: parsed.files_bytes,
            on_demand: slot.is_on_demand(),
            share: self.needed,
            boot_id: boot_id.to_owned(),
            container: occupant.container,
            pid: occupant.pid,
            pid_start: occupant.pid_start,
            link: occupant.link,
        }
    }

    /// Moves the slot to `Claimed`, and returns the run's share of the headroom.
    fn commit(self) -> Share {
        // The run takes over its lease's share.
        let share = self.share.or_else(|| self.slot.leased_share());
        self.slot.step(self.life, self.next);
        share.expect("a slot that is claimed has taken a share, or its lease has")
    }
}

impl Slots {
    /// From here on, the run reports its own progress.
    fn hand_over(&self, slot: &Slot, run: Arc<Run>, order: Order, share: Share) {
        let claim = Claim { run, order, share };
        if let Err(unsent) = slot.claims.try_send(claim) {
            let reason = "the slot has ended".into();
            let run = unsent.into_inner().run;
            self.runs.aborted(&run, Refusal::Broken { reason });
        }
    }
}
