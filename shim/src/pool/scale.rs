//! Changes a pool's size, which is the count of its Nomad job.

use std::{collections::BTreeMap, time::Duration};

use polydev_proto::provider::Provider;
use tokio::time::{Instant, sleep};

use crate::nomad::{self, Nomad};
use polydev_transport::backoff::Backoff;

/// The largest pool.
pub const MAX_SIZE: u32 = 100;
/// The group of the pools' jobs, see `jobspecs/`.
pub const GROUP: &str = "pool";
/// The key of a drained pool's previous size in the meta of its scaling event.
const DRAINED_FROM: &str = "polydev_drained_from";
/// How long the shim waits for a deployment: as long as the jobs give their slots to become
/// healthy.
const DEPLOYMENT_TIMEOUT: Duration = Duration::from_secs(10 * 60);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Why the size of a pool was not changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`size` is `{given}`; must be 0 to {MAX_SIZE}")]
    Size { given: u32 },
    #[error(
        "Nomad has no job `{job}` with a group `{GROUP}`; submit jobspecs/pool-{provider}.nomad.hcl first"
    )]
    NoJob { job: String, provider: Provider },
    #[error("Nomad has not accepted a new size of `{job}` within {} s: {reason}", DEPLOYMENT_TIMEOUT.as_secs())]
    Deployment { job: String, reason: String },
    #[error("the pool of {provider} is not drained: it has {size} slots")]
    NotDrained { provider: Provider, size: u32 },
    #[error(transparent)]
    Nomad(#[from] nomad::Error),
}

/// The job that keeps a provider's warm slots.
#[must_use]
pub fn job(provider: Provider) -> String {
    format!("polydev-pool-{}", provider.name())
}

/// The size of a pool in Nomad.
#[derive(Debug, Clone, Copy)]
struct Size {
    now: u32,
    /// The size before the pool was drained.
    drained_from: Option<u32>,
}

impl Size {
    async fn of(nomad: &Nomad, provider: Provider) -> Result<Self, Error> {
        let job = job(provider);
        let mut groups = nomad.scaling(&job).await?.unwrap_or_default();
        let Some(group) = groups.remove(GROUP) else {
            return Err(Error::NoJob { job, provider });
        };
        // A later change of the size has ended the drain.
        let events = group.events.into_iter().flatten();
        let last = events
            .filter(|event| !event.error)
            .max_by_key(|event| event.time);
        let from = last.and_then(|event| event.meta?.get(DRAINED_FROM)?.as_str()?.parse().ok());
        Ok(Self {
            now: group.desired,
            drained_from: from.filter(|_| group.desired == 0),
        })
    }
}

/// Sets the size of a pool and returns its previous size. If Nomad does not accept the size yet,
/// calls `waiting` once with Nomad's reason.
///
/// # Errors
/// [`Error`]; the size is unchanged, unless Nomad did not answer.
///
/// # Cancel safety
/// A size that was sent to Nomad stays.
pub async fn scale(
    nomad: &Nomad,
    provider: Provider,
    size: u32,
    waiting: impl Fn(String),
) -> Result<u32, Error> {
    if size > MAX_SIZE {
        return Err(Error::Size { given: size });
    }
    let from = Size::of(nomad, provider).await?.now;
    set(nomad, provider, (from, size), BTreeMap::new(), waiting).await?;
    Ok(from)
}

/// Sets the size of a pool to 0 and stores the previous size in Nomad. Returns the previous size,
/// or `None` if the pool was drained already.
///
/// # Errors
/// As [`scale`].
///
/// # Cancel safety
/// As [`scale`].
pub async fn drain(
    nomad: &Nomad,
    provider: Provider,
    waiting: impl Fn(String),
) -> Result<Option<u32>, Error> {
    let size = Size::of(nomad, provider).await?;
    if size.drained_from.is_some() {
        return Ok(None);
    }
    let meta = [(DRAINED_FROM, size.now.to_string())].into();
    set(nomad, provider, (size.now, 0), meta, waiting).await?;
    Ok(Some(size.now))
}

/// Sets a drained pool to its previous size, and returns this size.
///
/// # Errors
/// As [`scale`]; [`Error::NotDrained`].
///
/// # Cancel safety
/// As [`scale`].
pub async fn resume(
    nomad: &Nomad,
    provider: Provider,
    waiting: impl Fn(String),
) -> Result<u32, Error> {
    let Size { now, drained_from } = Size::of(nomad, provider).await?;
    let from = drained_from.filter(|from| *from <= MAX_SIZE);
    let size = from.ok_or(Error::NotDrained {
        provider,
        size: now,
    })?;
    set(nomad, provider, (now, size), BTreeMap::new(), waiting).await?;
    Ok(size)
}

async fn set(
    nomad: &Nomad,
    provider: Provider,
    (from, to): (u32, u32),
    meta: BTreeMap<&str, String>,
    waiting: impl Fn(String),
) -> Result<(), Error> {
    let job = job(provider);
    let message = format!("polydev-shim: from {from} to {to} warm slots");
    let end = Instant::now() + DEPLOYMENT_TIMEOUT;
    let (mut pauses, mut is_told) = (Backoff::new(RETRY_INTERVAL, MAX_RETRY_INTERVAL), false);
    loop {
        match nomad.scale(&job, GROUP, to, &message, &meta).await {
            Ok(()) => {
                tracing::info!(job, from, to, "scaled");
                return Ok(());
            }
            Err(error) if error.is_deployment() => {
                let reason = crate::chain(&error);
                if Instant::now() >= end {
                    return Err(Error::Deployment { job, reason });
                }
                if !is_told {
                    is_told = true;
                    waiting(reason);
                }
            }
            Err(error) => return Err(error.into()),
        }
        sleep(pauses.next_wait()).await;
    }
}
