//! Leases: a slot that is kept for a run before its command is known, for callers that take
//! two steps. A lease has the id that its run will have, so that whoever knows it finds the
//! slot in the view, through any shim.

use std::{ops::RangeInclusive, time::Duration};

use polydev_proto::{
    node::{LeaseRequest, ReleaseRequest, node_service_client::NodeServiceClient},
    provider::Provider,
    runtime::{AllocateRequest, Lease},
};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, transport::Channel};
use uuid::Uuid;

use super::{
    Error, answered,
    attach::Name,
    claim::{backoff, none_idle},
    queue::{Place, Queue},
    request::{Invalid, LEAST, QUEUE_TIMEOUT, QUEUE_TIMEOUT_MOST, bounded, check_user},
};
use crate::pool::{Candidate, Kept, View};

const TIME: Duration = Duration::from_secs(60);
/// Well below the age of a run id that drivers take.
const TIMES: RangeInclusive<Duration> = LEAST..=Duration::from_secs(30 * 60);

/// What a caller wants to have.
#[derive(Debug)]
pub struct Wanted {
    pub provider: Provider,
    pub user_id: String,
    time: Duration,
    queue_timeout: Duration,
}

impl Wanted {
    /// # Errors
    /// [`Invalid`] for the first field that is wrong.
    pub fn parse(request: AllocateRequest) -> Result<Self, Invalid> {
        check_user(&request.user_id)?;
        Ok(Self {
            provider: request.provider.parse()?,
            user_id: request.user_id,
            time: bounded("time", request.time, TIME, TIMES, "1 ms to 30 min")?,
            queue_timeout: bounded(
                "queue_timeout",
                request.queue_timeout,
                QUEUE_TIMEOUT,
                Duration::ZERO..=QUEUE_TIMEOUT_MOST,
                "0 s to 30 min",
            )?,
        })
    }
}

/// Gets a lease, in the user's turn.
///
/// # Errors
/// [`Error`]; a lease that a driver may have granted without an answer is given back.
pub async fn allocate(view: &View, queue: &Queue, wanted: Wanted) -> Result<Lease, Error> {
    let Wanted {
        provider,
        user_id,
        time,
        queue_timeout,
    } = wanted;
    let give_up = Instant::now() + queue_timeout;
    let mut ticket = queue.enter(provider.name(), &user_id)?;
    let (mut refused, mut pauses) = (None, backoff());
    loop {
        let slot = async {
            ticket.turn().await;
            view.idle_slot(provider.name()).await
        };
        let Ok(slot) = timeout_at(give_up, slot).await else {
            let waited = queue_timeout;
            return Err(match *ticket.place.borrow() {
                Place::Held(_) => Error::AtLimit { user_id, waited },
                Place::Behind(_) | Place::Next => {
                    none_idle(view, provider.name(), waited, [refused, None])
                }
            });
        };
        let running = ticket.served();
        match lease(&slot, &user_id, time).await {
            Ok(lease) => {
                slot.leased(&lease.lease_id);
                return Ok(lease);
            }
            Err(reason) => {
                tracing::info!(slot = slot.slot_id, reason, "a lease was refused");
                refused = Some(reason);
            }
        }
        if Instant::now() >= give_up {
            return Err(none_idle(
                view,
                provider.name(),
                queue_timeout,
                [refused, None],
            ));
        }
        sleep(pauses.next_wait()).await;
        ticket = running.back();
    }
}

/// Why not, if a driver refuses or does not answer.
async fn lease(slot: &Candidate, user_id: &str, time: Duration) -> Result<Lease, String> {
    let run_id = Uuid::now_v7().to_string();
    let request = LeaseRequest {
        run_id: run_id.clone(),
        slot_id: slot.slot_id.clone(),
        generation: slot.generation,
        start_id: slot.start_id.clone(),
        user_id: user_id.to_owned(),
        time: time.try_into().ok(),
    };
    let unclear = Unclear(Some((
        slot.channel.clone(),
        ReleaseRequest {
            run_id: run_id.clone(),
            user_id: user_id.to_owned(),
        },
    )));
    let mut client = NodeServiceClient::new(slot.channel.clone());
    match answered(client.lease(request)).await {
        Ok(leased) => {
            unclear.settled();
            Ok(Lease {
                lease_id: run_id,
                slot_id: slot.slot_id.clone(),
                node_id: slot.node_id.clone(),
                generation: slot.generation,
                expires_at: leased.into_inner().expires_at,
            })
        }
        Err(status) => {
            if matches!(
                status.code(),
                Code::FailedPrecondition | Code::ResourceExhausted | Code::InvalidArgument
            ) {
                unclear.settled();
            }
            Err(status.message().to_owned())
        }
    }
}

/// A lease that may have been granted, and that nobody knows of: given back when dropped.
struct Unclear(Option<(Channel, ReleaseRequest)>);

impl Unclear {
    fn settled(mut self) {
        self.0 = None;
    }
}

impl Drop for Unclear {
    fn drop(&mut self) {
        if let Some((channel, release)) = self.0.take() {
            // Should that fail too, its time ends it.
            tokio::spawn(async move {
                let _gone = answered(NodeServiceClient::new(channel).release(release)).await;
            });
        }
    }
}

/// Gives a lease back before its time, from where the [view](View::leased) has it.
///
/// # Errors
/// [`Error::NoLease`] if there is none, [`Error::Forbidden`] if it is another user's,
/// [`Error::Unasked`] if its node does not answer.
pub async fn release(view: &View, kept: Option<Kept>, name: &Name) -> Result<(), Error> {
    let lease_id = name.run_id.clone();
    let Some(Kept {
        node_id, channel, ..
    }) = kept
    else {
        return Err(match view.channels().1 {
            nodes if nodes.is_empty() => Error::NoLease { lease_id },
            nodes => Error::Unasked { nodes },
        });
    };
    let request = ReleaseRequest {
        run_id: name.run_id.clone(),
        user_id: name.user_id.clone(),
    };
    let released = answered(NodeServiceClient::new(channel).release(request)).await;
    match released {
        Ok(_) => Ok(()),
        Err(status) if status.code() == Code::NotFound => Err(Error::NoLease { lease_id }),
        Err(status) if status.code() == Code::PermissionDenied => Err(Error::Forbidden {
            run_id: lease_id,
            user_id: name.user_id.clone(),
        }),
        Err(_) => Err(Error::Unasked {
            nodes: vec![node_id],
        }),
    }
}
