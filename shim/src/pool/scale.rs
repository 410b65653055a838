//! Changes a pool's size, which is the count of its Nomad job.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::{
    nomad::{self, Nomad},
    provider::Provider,
};

/// The largest pool.
pub const SIZE_MOST: u32 = 100;
/// The group of the pools' jobs, see `jobspecs/`.
const GROUP: &str = "pool";
/// How long a deployment is waited for: as long as the jobs give their slots to become
/// healthy.
const DEPLOYMENT: Duration = Duration::from_secs(10 * 60);
const RETRY: Duration = Duration::from_millis(500);
const RETRY_MOST: Duration = Duration::from_secs(5);

/// Why a pool has the size it had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`size` is `{given}`, allowed are 0 to {SIZE_MOST}")]
    Size { given: u32 },
    #[error(
        "Nomad has no job `{job}` with a group `{GROUP}`; submit jobspecs/pool-{provider}.nomad.hcl first"
    )]
    NoJob { job: String, provider: Provider },
    #[error("Nomad still takes no other size of `{job}` after {} s: {reason}", DEPLOYMENT.as_secs())]
    Deployment { job: String, reason: String },
    #[error(transparent)]
    Nomad(#[from] nomad::Error),
}

/// The job that keeps a provider's warm slots.
fn job(provider: Provider) -> String {
    format!("polydev-pool-{}", provider.name())
}

/// Sets the size of a pool; the size it had. `waiting` hears Nomad's reason, once, if it
/// has to be waited for.
///
/// # Errors
/// [`Error`]; the size is as it was, unless Nomad did not answer.
///
/// # Cancel safety
/// A size that Nomad was told stands.
pub async fn scale(
    nomad: &Nomad,
    provider: Provider,
    size: u32,
    waiting: impl Fn(String),
) -> Result<u32, Error> {
    if size > SIZE_MOST {
        return Err(Error::Size { given: size });
    }
    let job = job(provider);
    let counts = nomad.counts(&job).await?.unwrap_or_default();
    let Some(from) = counts.get(GROUP).copied() else {
        return Err(Error::NoJob { job, provider });
    };
    let message = format!("polydev-shim: from {from} to {size} warm slots");
    let (end, mut retry, mut is_told) = (Instant::now() + DEPLOYMENT, RETRY, false);
    loop {
        match nomad.scale(&job, GROUP, size, &message).await {
            Ok(()) => {
                tracing::info!(job, from, to = size, "scaled");
                return Ok(from);
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
        sleep(retry.mul_f64(rand::random_range(0.5..1.0))).await;
        retry = RETRY_MOST.min(retry * 2);
    }
}
