//! One container: its servers, its speed, and the run that has it.
//!
//! `Waiting -> Granted -> Over`, or `Waiting -> Over`; never backwards, because a container
//! serves at most one run.

use std::sync::Arc;

use parking_lot::Mutex;
use polydev_proto::{
    broker::{Open, Seen},
    budget::Exhausted,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{
    changes::Changes, egress::Egress, grant::Grant, rate::Bucket, request::Refusal,
    upstream::Upstreams,
};

/// Most connections of one container; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 128;
/// Most tunnels of one container: some connections stay for its model.
const MAX_TUNNELS: usize = 96;

/// The right of one connection to be there, for as long as any of it is.
pub(crate) type Place = Arc<OwnedSemaphorePermit>;

/// A container, for whoever serves its requests.
#[derive(Debug)]
pub(crate) struct Container {
    /// What the driver has sent, for the driver's next life.
    pub(crate) request: Open,
    pub(crate) upstreams: Upstreams,
    /// `None` if the container has a network interface, and needs no proxy.
    pub(crate) egress: Option<Egress>,
    /// What the container sends.
    pub(crate) upload: Arc<Bucket>,
    /// What the container receives.
    pub(crate) download: Arc<Bucket>,
    places: Arc<Semaphore>,
    tunnels: Arc<Semaphore>,
    state: Mutex<State>,
    changes: Arc<Changes>,
    /// Cancelled when the container is closed, and its run ends with it.
    over: CancellationToken,
}

#[derive(Debug)]
enum State {
    Waiting,
    Granted(Arc<Grant>),
    Over,
}

/// A container that has had its run takes no other.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the container has had its run")]
pub(crate) struct Taken;

impl Container {
    pub(crate) fn new(
        request: Open,
        upstreams: Upstreams,
        egress: Option<Egress>,
        changes: Arc<Changes>,
    ) -> Self {
        let bytes_per_second = request.bytes_per_second;
        Self {
            request,
            upstreams,
            egress,
            upload: Bucket::new(bytes_per_second).into(),
            download: Bucket::new(bytes_per_second).into(),
            places: Semaphore::new(MAX_CONNECTIONS).into(),
            tunnels: Semaphore::new(MAX_TUNNELS).into(),
            state: State::Waiting.into(),
            changes,
            over: CancellationToken::new(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.request.container
    }

    /// Whether nobody has had it yet: not even a run whose grant cannot be read any more.
    pub(crate) fn rehearses(&self) -> bool {
        self.request.rehearses && self.request.grant.is_none()
    }

    pub(crate) fn set_rate(&self, bytes_per_second: u64) {
        self.upload.set_rate(bytes_per_second);
        self.download.set_rate(bytes_per_second);
    }

    /// Waits until there may be another connection. Cancel safe.
    pub(crate) async fn place(&self) -> Place {
        let place = self.places.clone().acquire_owned().await;
        place.expect("it is never closed").into()
    }

    /// The right to a tunnel.
    ///
    /// # Errors
    /// [`Refusal::Tunnels`] if there are too many.
    pub(crate) fn tunnel(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        let tunnel = self.tunnels.clone().try_acquire_owned();
        tunnel.map_err(|_| Refusal::Tunnels { most: MAX_TUNNELS })
    }

    /// For a grant, and for whoever serves the container's connections.
    pub(crate) fn over(&self) -> &CancellationToken {
        &self.over
    }

    /// Gives the container to a run. The same run may have it again: nothing changes then.
    ///
    /// # Errors
    /// [`Taken`]
    pub(crate) fn grant(&self, grant: Grant) -> Result<(), Taken> {
        let mut state = self.state.lock();
        match &*state {
            State::Waiting => {
                *state = State::Granted(grant.into());
                Ok(())
            }
            State::Granted(known) if known.run_id() == grant.run_id() => Ok(()),
            State::Granted(_) | State::Over => Err(Taken),
        }
    }

    /// The run that has the container.
    ///
    /// # Errors
    /// [`Refusal::NoRun`], [`Refusal::Over`]
    pub(crate) fn granted(&self) -> Result<Arc<Grant>, Refusal> {
        match &*self.state.lock() {
            State::Waiting => Err(Refusal::NoRun),
            State::Granted(grant) => Ok(grant.clone()),
            State::Over => Err(Refusal::Over),
        }
    }

    /// There is something new for the driver.
    pub(crate) fn changed(&self) {
        self.changes.add(self.name());
    }

    /// Counts another request of a run to a model, if its budget allows it.
    ///
    /// # Errors
    /// [`Exhausted`]
    pub(crate) fn ask(&self, grant: &Grant) -> Result<(), Exhausted> {
        let asked = grant.ask();
        match &asked {
            Ok(()) => self.changes.add_soon(self.name()),
            Err(_) => self.changed(),
        }
        asked
    }

    /// What has been seen of the container's run; `None` if it has had none.
    pub(crate) fn seen(&self) -> Option<Seen> {
        let grant = self.granted().ok()?;
        Some(Seen {
            container: self.name().to_owned(),
            run_id: grant.run_id().to_owned(),
            destinations: grant.reached.message(),
            ..grant.seen.message()
        })
    }

    /// Ends the run: what is in progress breaks off, and its keys are wiped with the last of it.
    pub(crate) fn close(&self) {
        *self.state.lock() = State::Over;
        self.over.cancel();
    }
}
