//! One container: its connections, its speed, and the run that has it.
//!
//! `Waiting -> Granted -> Over`, or `Waiting -> Over`; never backwards, because a container
//! serves at most one run.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::{
    grant::Grant,
    rate::Bucket,
    request::Refusal,
    upstream::{Connections, Upstreams},
};

/// A container, for whoever serves its requests.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) name: String,
    pub(crate) upstreams: Arc<Upstreams>,
    /// What the container sends.
    pub(crate) upload: Arc<Bucket>,
    /// What the container receives.
    pub(crate) download: Arc<Bucket>,
    state: Mutex<State>,
    /// Cancelled when the run ends, or the container without one.
    over: CancellationToken,
}

#[derive(Debug)]
enum State {
    Waiting(Connections),
    Granted(Connections, Arc<Grant>),
    Over,
}

/// A container that has had its run takes no other.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the container has had its run")]
pub(crate) struct Taken;

impl Container {
    pub(crate) fn new(
        name: String,
        upstreams: Arc<Upstreams>,
        connections: Connections,
        bytes_per_second: u64,
    ) -> Self {
        Self {
            name,
            upstreams,
            upload: Bucket::new(bytes_per_second).into(),
            download: Bucket::new(bytes_per_second).into(),
            state: State::Waiting(connections).into(),
            over: CancellationToken::new(),
        }
    }

    pub(crate) fn set_rate(&self, bytes_per_second: u64) {
        self.upload.set_rate(bytes_per_second);
        self.download.set_rate(bytes_per_second);
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
            State::Waiting(connections) => {
                *state = State::Granted(connections.clone(), grant.into());
                Ok(())
            }
            State::Granted(_, known) if known.run_id == grant.run_id => Ok(()),
            State::Granted(..) | State::Over => Err(Taken),
        }
    }

    /// The run that has the container.
    ///
    /// # Errors
    /// [`Refusal::NoRun`], [`Refusal::Over`]
    pub(crate) fn granted(&self) -> Result<(Connections, Arc<Grant>), Refusal> {
        match &*self.state.lock() {
            State::Waiting(_) => Err(Refusal::NoRun),
            State::Granted(connections, grant) => Ok((connections.clone(), grant.clone())),
            State::Over => Err(Refusal::Over),
        }
    }

    /// Ends the run: what is in progress breaks off, and its keys are wiped with the last of it.
    pub(crate) fn revoke(&self) {
        *self.state.lock() = State::Over;
        self.over.cancel();
    }
}
