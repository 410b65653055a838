//! The agent of a slot: the provider's CLI, or a Python, which is started while the slot is filled
//! and waits for a prompt or a script. Init and its agent know how; the driver gives it the CPU of a
//! run until it is ready, because on that of an idle slot a CLI starts for up to 17 seconds.

use std::time::{Duration, Instant};

use polydev_proto::{
    init::{self, Park, agent::State, from_init, to_init},
    workspace,
};
use tokio::time::{sleep_until, timeout};

use super::Slot;
use crate::{
    life::Event,
    limits::{self, Limits},
    link::{self, Connection},
};

/// From the start of the CLI until its agent says that it waits. Longer than the agent itself
/// waits for it, so that the reason is the agent's.
const READY_TIMEOUT: Duration = Duration::from_secs(75);

/// Why a slot has no agent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the agent cannot wait: {0}")]
    Gone(String),
    #[error("the agent was not ready within {} s", READY_TIMEOUT.as_secs())]
    TimedOut,
    #[error("the slot was stopped while its agent started")]
    Stopped,
    #[error("init cannot be used")]
    Link(#[from] link::Error),
    #[error("cannot set the limits of an agent that starts")]
    Limits(#[from] limits::Error),
}

/// Starts the agent of a container that waits for a claim, and waits until it is ready. Returns what
/// init says of it.
///
/// # Errors
/// [`Error`]; the container is of no use then.
///
/// # Cancel safety
/// None: do not cancel it.
pub(super) async fn park(
    slot: &Slot,
    connection: &mut Connection,
    limits: &limits::Handle,
    run: &Limits,
) -> Result<init::Agent, Error> {
    let starting = Limits {
        cpu_mhz: run.cpu_mhz.max(slot.idle.cpu_mhz),
        ..slot.idle
    };
    limits.set(&starting)?;
    let link = connection.link.as_mut().ok_or(link::Error::Closed)?;
    let park = Park {
        provider: slot.config.provider.to_string(),
        work_dir: workspace::PATH.into(),
        imports: slot.config.imports.clone(),
        asks: slot.config.tool_policy,
    };
    link.writer.send(to_init::Message::Park(park)).await?;
    let ready = async {
        loop {
            let from_init::Message::Agent(agent) = link.reader.next().await? else {
                return Err(link::Error::NotWaiting.into());
            };
            match agent.state() {
                State::Ready => return Ok(agent),
                State::Gone => return Err(Error::Gone(agent.reason)),
                State::Starting | State::Unspecified => {}
            }
        }
    };
    let parked = tokio::select! {
        parked = timeout(READY_TIMEOUT, ready) => parked.map_err(|_| Error::TimedOut)?,
        () = slot.drain.cancelled() => return Err(Error::Stopped),
    };
    limits.set(&slot.idle)?;
    parked
}

/// Waits until the agent of an idle slot has waited for long enough; a claim of its container is
/// then impossible. Slots that were filled at the same time are not renewed at the same time.
///
/// # Cancel safety
/// Loses nothing but the part of the time that is left to chance.
pub(super) async fn renewed(slot: &Slot, since: Instant) {
    let Some(age) = slot.config.agent.then_some(slot.config.agent_max_age) else {
        return std::future::pending().await;
    };
    let until = since + age.mul_f64(rand::random_range(0.8..1.0));
    sleep_until(until.into()).await;
    // Fails in a slot that is leased or claimed: its container ends with that.
    if slot.try_apply(Event::Renewed).is_err() {
        std::future::pending().await
    }
}

/// An agent that cannot be given a prompt.
pub(super) fn gone(reason: String) -> init::Agent {
    init::Agent {
        state: State::Gone.into(),
        reason,
    }
}

/// Whether an agent waits in the container of which init says this.
pub(super) fn is_ready(agent: Option<&init::Agent>) -> bool {
    agent.is_some_and(|agent| agent.state() == State::Ready)
}
