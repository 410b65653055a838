//! Leases. A lease keeps a slot for a run whose command is not known yet, for callers that work
//! in two steps. A lease has the id that its run will have, so the caller finds the slot through
//! any shim.

use std::{ops::RangeInclusive, sync::Arc, time::Duration};

use polydev_proto::{
    id::{RunId, UserId},
    node::{LeaseRequest, ReleaseRequest, node_service_client::NodeServiceClient},
    provider::Provider,
    runtime::{AllocateRequest, Lease},
};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, transport::Channel};

use super::{
    Error, answered,
    attach::Name,
    claim::{backoff, none_idle},
    queue::{Place, Queue, Wants},
    request::{Invalid, MIN_TIME, bounded, parse_user, queue_timeout},
    terms::Terms,
};
use crate::{
    access::Policy,
    pool::{Candidate, Kept, View},
};

const DEFAULT_TIME: Duration = Duration::from_secs(60);
/// Well below the largest age of a run id that drivers accept.
const TIMES: RangeInclusive<Duration> = MIN_TIME..=Duration::from_secs(30 * 60);

/// The lease that a caller asks for.
#[derive(Debug)]
pub struct Wanted {
    pub provider: Provider,
    pub user_id: UserId,
    time: Duration,
    queue_timeout: Duration,
}

impl Wanted {
    /// # Errors
    /// [`Invalid`] for the first field that is wrong.
    pub fn parse(request: AllocateRequest) -> Result<Self, Invalid> {
        let user_id = parse_user(request.user_id)?;
        Ok(Self {
            provider: request.provider.parse()?,
            user_id,
            time: bounded("time", request.time, DEFAULT_TIME, TIMES, "1 ms to 30 min")?,
            queue_timeout: queue_timeout(request.queue_timeout)?,
        })
    }
}

/// Gets a lease, after the user's turn in the queue has come.
///
/// # Errors
/// [`Error`]; a lease that a driver may have granted without an answer is released.
pub async fn allocate(
    view: &View,
    queue: &Queue,
    wanted: Wanted,
    role: Arc<Policy>,
) -> Result<Lease, Error> {
    let Wanted {
        provider,
        user_id,
        time,
        queue_timeout,
    } = wanted;
    let give_up = Instant::now() + queue_timeout;
    let mut ticket = queue.enter(provider.name(), &user_id, Wants::Lease, false)?;
    let terms = Terms {
        role,
        user_id: user_id.clone(),
        has_outside_key: false, // The run will say.
    };
    let (mut refused, mut pauses) = (None, backoff());
    loop {
        let Ok(slot) = timeout_at(give_up, ticket.slot()).await else {
            let waited = queue_timeout;
            return Err(match *ticket.place.borrow() {
                Place::Held(_) => Error::AtLimit { user_id, waited },
                Place::Behind(_) | Place::Next | Place::Evicted => {
                    none_idle(view, provider.name(), waited, [refused, None])
                }
            });
        };
        let slot = slot?;
        let running = ticket.served();
        match terms.fitting(view, slot) {
            Ok(slot) => match lease(&slot, &user_id, time).await {
                Ok(lease) => return Ok(lease),
                Err(reason) => {
                    tracing::info!(slot = %slot.slot_id, reason, "a lease was refused");
                    refused = Some(reason);
                }
            },
            Err(reason) => refused = Some(reason.to_owned()),
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

/// Leases a slot. The error is the reason of a driver that refuses or does not answer.
async fn lease(slot: &Candidate, user_id: &UserId, time: Duration) -> Result<Lease, String> {
    let run_id = RunId::now();
    let request = LeaseRequest {
        run_id: run_id.into(),
        slot_id: slot.slot_id.clone().into(),
        generation: slot.generation.0,
        start_id: slot.start_id.clone(),
        user_id: user_id.clone().into(),
        time: time.try_into().ok(),
    };
    let unclear = Unclear(Some((
        slot.channel.clone(),
        ReleaseRequest {
            run_id: run_id.into(),
            user_id: user_id.clone().into(),
        },
    )));
    let mut client = NodeServiceClient::new(slot.channel.clone());
    match answered(client.lease(request)).await {
        Ok(leased) => {
            unclear.settled();
            slot.leased(user_id, run_id);
            Ok(Lease {
                lease_id: run_id.into(),
                slot_id: slot.slot_id.clone().into(),
                node_id: slot.node_id.clone(),
                generation: slot.generation.0,
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

/// A lease that may have been granted without anybody knowing it. Drop releases it.
struct Unclear(Option<(Channel, ReleaseRequest)>);

impl Unclear {
    fn settled(mut self) {
        self.0 = None;
    }
}

impl Drop for Unclear {
    fn drop(&mut self) {
        if let Some((channel, release)) = self.0.take() {
            // If the release fails too, the lease ends with its time.
            tokio::spawn(async move {
                let _gone = answered(NodeServiceClient::new(channel).release(release)).await;
            });
        }
    }
}

/// Releases a lease before its time. `kept` is its slot in the [view](View::leased).
///
/// # Errors
/// [`Error::NoLease`] if there is none, [`Error::Forbidden`] if it is another user's,
/// [`Error::Unasked`] if its node does not answer.
pub async fn release(view: &View, kept: Option<Kept>, name: &Name) -> Result<(), Error> {
    let lease_id = name.run_id;
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
        run_id: name.run_id.into(),
        user_id: name.user_id.clone().into(),
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
