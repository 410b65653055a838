//! Getting a run its container, in the order it happens. A retry first closes the run to all
//! other tries. If the policy requires it, the run waits for somebody's approval ([`approval`]), at
//! its place in the queue. A run with a lease claims the slot of the lease. Any other run waits for its
//! turn and for an idle slot, and claims that ([`attempt`]); only after a definite refusal does
//! it claim the next.

mod approval;
mod attempt;

use std::{collections::BTreeSet, time::Duration};

use polydev_proto::{
    id::{RunId, UserId},
    runtime::{Queued, RunEvent, run_event},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    Connection, Error,
    on_demand::{OnDemand, Order},
    queue::{Full, Place, Queue, Running, Ticket, Wants},
    request::Request,
};
use crate::{
    approval::Approvals,
    pool::{Candidate, View},
};
use attempt::{Attempt, Attempts};
use polydev_transport::backoff::Backoff;

/// The pause between a refusal and the next slot: the first value, and the largest.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);
const MAX_RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// How long this shim waits to hear about a lease that another shim got.
const LEASE_TIMEOUT: Duration = Duration::from_secs(1);
/// Largest number of nodes without room that are tried in one turn.
const MAX_NODES: usize = 8;

/// Claims a slot for `request`. If the run exists already, attaches to it.
///
/// # Errors
/// [`Error`]; the command has not run, except with [`Error::Unclear`] and
/// [`Error::MayHaveRun`].
///
/// # Cancel safety
/// A claim that is granted meanwhile runs.
pub async fn claim(
    turns: &Turns,
    mut request: Request,
    caller: &mpsc::Sender<Result<RunEvent, Error>>,
) -> Result<(Connection, Option<Running>), Error> {
    let Turns {
        view,
        queue,
        approvals,
        on_demand,
    } = turns;
    let (is_retry, is_leased) = (request.is_retry, request.is_leased);
    let (provider, queue_timeout) = (request.provider, request.queue_timeout);
    let (run_id, user_id) = (request.run_id, request.user_id.clone());
    let wanted = request.wanted.take();
    let mut attempts = Attempts::new(view, request);
    if is_retry && let Some(connection) = attempts.fence().await? {
        return Ok((connection, None));
    }
    if is_leased {
        if let Some(wanted) = wanted {
            let approver = approval::wait(approvals, wanted, caller).await?;
            attempts.approved_by(&approver);
        }
        // The lease has waited its turn already. The run counts as an active run of its user.
        let running = queue.pass(provider.name(), &user_id, run_id);
        let connection = leased(view, provider.name(), run_id, &mut attempts).await?;
        return Ok((connection, Some(running)));
    }
    let wants = Wants::Run(run_id);
    let mut ticket = queue.enter(provider.name(), &user_id, wants, wanted.is_some())?;
    if let Some(wanted) = wanted {
        let approver = tokio::select! {
            approver = approval::wait(approvals, wanted, caller) => approver?,
            full = ticket.lost() => return Err(full.into()),
        };
        attempts.approved_by(&approver);
        ticket.approved();
    }
    let give_up = Instant::now() + queue_timeout;
    let place = ticket.place.clone();
    let order = on_demand.order(view.clone(), provider, run_id, place);
    let waiting = Waiting {
        view,
        caller,
        provider: provider.name(),
        run_id,
        user_id,
        queue_timeout,
        give_up,
        order: Some(order),
        dispatched: None,
        last_refusal: None,
    };
    waiting.claim(ticket, &mut attempts).await
}

/// What runs wait for: an approval, their turn, and a slot.
#[derive(Debug, Clone)]
pub struct Turns {
    pub view: View,
    pub queue: Queue,
    pub approvals: Approvals,
    pub on_demand: OnDemand,
}

/// Claims the slot that is leased for the run.
async fn leased(
    view: &View,
    provider: &str,
    run_id: RunId,
    attempts: &mut Attempts<'_>,
) -> Result<Connection, Error> {
    let ended = |reason: String| Error::LeaseEnded {
        lease_id: run_id,
        reason,
    };
    let slot = timeout(LEASE_TIMEOUT, view.slot_for(run_id)).await;
    let Ok(slot) = slot else {
        return Err(match view.channels().1 {
            nodes if nodes.is_empty() => ended("no node has the lease".into()),
            nodes => Error::Unasked { nodes },
        });
    };
    // The caller's roles were checked for the provider that the caller named.
    if slot.provider != provider {
        return Err(ended(format!("its slot is for `{}`", slot.provider)));
    }
    match attempts.at(&slot).await? {
        Attempt::Granted(connection) => Ok(*connection),
        // The lease stays valid.
        Attempt::NoRoom(reason) => Err(Error::NotRun { reason }),
        Attempt::Refused(reason) => Err(ended(reason)),
    }
}

/// A run that waits for its turn, and then for a slot.
struct Waiting<'a> {
    view: &'a View,
    caller: &'a mpsc::Sender<Result<RunEvent, Error>>,
    provider: &'static str,
    run_id: RunId,
    user_id: UserId,
    /// How long the run may wait, and until when.
    queue_timeout: Duration,
    give_up: Instant,
    /// The order for the run's own slot, until that slot is claimed. Drop withdraws it.
    order: Option<Order>,
    /// When that slot was ordered.
    dispatched: Option<std::time::Instant>,
    last_refusal: Option<String>,
}

impl Waiting<'_> {
    /// Claims slots until one is granted, or the run has waited for too long.
    async fn claim(
        mut self,
        mut ticket: Ticket,
        attempts: &mut Attempts<'_>,
    ) -> Result<(Connection, Option<Running>), Error> {
        let mut pauses = backoff();
        loop {
            let slot = self.slot(&mut ticket).await?;
            // The next run in the queue may claim another slot meanwhile.
            let running = ticket.served();
            // This run keeps the slot until after the pause: no other run of this shim claims
            // a slot that was refused just now.
            let (attempt, _slot) = match attempts.terms.fitting(self.view, slot) {
                Ok(slot) => {
                    // From now on the run may be in the slot, whatever the answer is. If the order
                    // were withdrawn, the run would end.
                    if let Some(order) = self.order.take_if(|_| slot.on_demand) {
                        self.dispatched = order.used();
                    }
                    let (attempt, slot) = self.in_turn(slot, attempts).await?;
                    (attempt, Some(slot))
                }
                Err(reason) => (Attempt::Refused(reason.into()), None),
            };
            match attempt {
                Attempt::Granted(mut connection) => {
                    if connection.on_demand {
                        connection.dispatched = self.dispatched;
                    }
                    return Ok((*connection, Some(running)));
                }
                Attempt::NoRoom(reason) | Attempt::Refused(reason) => {
                    self.last_refusal = Some(reason);
                }
            }
            if Instant::now() >= self.give_up {
                return Err(self.none_idle(None));
            }
            // The view learns the reason in a moment. Until then it may offer the same slot.
            sleep(pauses.next_wait()).await;
            ticket = running.back();
        }
    }

    /// Waits for the run's turn, and then for a slot.
    async fn slot(&self, ticket: &mut Ticket) -> Result<Candidate, Error> {
        let slot = wait(self.view, ticket, self.run_id, self.caller);
        if let Ok(slot) = timeout_at(self.give_up, slot).await {
            return Ok(slot?);
        }
        let place = *ticket.place.borrow();
        Err(match place {
            Place::Behind(before) => {
                let behind = format!("{before} runs of this shim were ahead of this one");
                self.none_idle(Some(behind))
            }
            Place::Held(_) => Error::AtLimit {
                user_id: self.user_id.clone(),
                waited: self.queue_timeout,
            },
            Place::Next | Place::Evicted => self.none_idle(None),
        })
    }

    /// Claims `slot`, and slots of other nodes while nodes have no room for the run. Returns the
    /// outcome of the last claim, and its slot.
    async fn in_turn(
        &self,
        mut slot: Candidate,
        attempts: &mut Attempts<'_>,
    ) -> Result<(Attempt, Candidate), Error> {
        let mut full = BTreeSet::new();
        loop {
            let attempt = attempts.at(&slot).await?;
            if let Attempt::NoRoom(reason) | Attempt::Refused(reason) = &attempt {
                tracing::info!(
                    slot = %slot.slot_id,
                    reason,
                    "a claim was refused, trying another slot"
                );
            }
            full.insert(slot.node_id.clone());
            let next = match &attempt {
                // A slot on demand comes out of turn: the pool's slots are for the next run in
                // the queue.
                Attempt::NoRoom(_) if !slot.on_demand && full.len() < MAX_NODES => {
                    let next = self.view.idle_beyond(&slot.provider, &full);
                    next.and_then(|next| attempts.terms.fitting(self.view, next).ok())
                }
                _ => None,
            };
            match next {
                Some(next) => slot = next,
                None => return Ok((attempt, slot)),
            }
        }
    }

    /// Why the run has got no slot. `behind` is the reason if no driver has refused the run.
    fn none_idle(&self, behind: Option<String>) -> Error {
        let reasons = [
            self.last_refusal.clone().or(behind),
            self.order.as_ref().map(Order::told),
        ];
        none_idle(self.view, self.provider, self.queue_timeout, reasons)
    }
}

/// The pauses between a refusal and the next slot.
pub(super) fn backoff() -> Backoff {
    Backoff::new(RETRY_INTERVAL, MAX_RETRY_INTERVAL)
}

/// Waits for the run's turn, and then for a slot. Sends the caller its place in the queue unless
/// the run gets a slot at once.
async fn wait(
    view: &View,
    ticket: &mut Ticket,
    run_id: RunId,
    caller: &mpsc::Sender<Result<RunEvent, Error>>,
) -> Result<Candidate, Full> {
    let mut place = ticket.place.clone();
    let tell = async {
        loop {
            let before = match *place.borrow_and_update() {
                Place::Next | Place::Evicted => 0,
                Place::Behind(before) | Place::Held(before) => {
                    u32::try_from(before).unwrap_or(u32::MAX)
                }
            };
            let queued = run_event::Event::Queued(Queued { before });
            // A caller that does not read misses some changes.
            let _full = caller.try_send(Ok(RunEvent {
                event: Some(queued),
            }));
            if place.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        biased;
        slot = ticket.slot() => slot,
        // This slot is only for this run, so the run overtakes nobody.
        slot = view.slot_for(run_id) => Ok(slot),
        () = tell => unreachable!("it never ends"),
    }
}

pub(super) fn none_idle(
    view: &View,
    provider: &'static str,
    waited: Duration,
    reasons: [Option<String>; 2],
) -> Error {
    if view.nodes().0 == 0 {
        return Error::NoNode;
    }
    let pool = match view.counts().get(provider) {
        None => "the provider has no slots".to_owned(),
        Some(pool) => format!(
            "of its slots {} are idle, {} warming, {} leased, {} claimed, {} recycling, {} draining, {} failed",
            pool.idle,
            pool.warming,
            pool.leased,
            pool.claimed,
            pool.recycling,
            pool.draining,
            pool.failed
        ),
    };
    let reasons = reasons
        .into_iter()
        .flatten()
        .filter(|reason| !reason.is_empty());
    Error::NoIdleSlot {
        provider,
        waited,
        pool: reasons.fold(pool, |told, reason| format!("{told}; {reason}")),
    }
}
