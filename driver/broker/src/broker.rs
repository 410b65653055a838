//! Every container that is open, by name.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use polydev_proto::{
    broker::{Grant as GrantRequest, Open, from_broker},
    sealed::PrivateKey,
};
use tokio::{net::TcpListener, sync::mpsc, task::AbortHandle};

use crate::{
    container::Container,
    events::Events,
    grant::Grant,
    serve::serve,
    upstream::{self, Upstreams},
};

/// The broker of one node.
#[derive(Debug)]
pub struct Broker {
    key: PrivateKey,
    upstreams: Arc<Upstreams>,
    events: Events,
    open: Mutex<HashMap<String, Opened>>,
}

#[derive(Debug)]
struct Opened {
    container: Arc<Container>,
    /// Accepts the container's connections.
    serving: AbortHandle,
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.serving.abort();
        self.container.revoke();
    }
}

/// Why a container cannot have a grant. Never quotes a key.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the broker has no container of this name")]
    Unknown,
    #[error(transparent)]
    Sealed(#[from] polydev_proto::sealed::Error),
    #[error(transparent)]
    Keys(#[from] crate::grant::Error),
    #[error(transparent)]
    Taken(#[from] crate::container::Taken),
}

impl Broker {
    /// A broker without containers, and what it tells the driver.
    #[must_use]
    pub fn new(upstreams: Upstreams) -> (Self, mpsc::Receiver<from_broker::Message>) {
        let (events, told) = Events::new();
        let broker = Self {
            key: PrivateKey::generate(),
            upstreams: upstreams.into(),
            events,
            open: Mutex::default(),
        };
        (broker, told)
    }

    /// What keys are sealed to, 32 bytes.
    #[must_use]
    pub fn public_key(&self) -> Bytes {
        self.key.public()
    }

    /// The names of the containers that are open.
    #[must_use]
    pub fn containers(&self) -> Vec<String> {
        self.open.lock().keys().cloned().collect()
    }

    /// Serves what connects to `listener`, which is in the container. If a container of this
    /// name is open, it stays, with the new rate.
    ///
    /// # Errors
    /// [`upstream::Error`]
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn open(&self, request: &Open, listener: TcpListener) -> Result<(), upstream::Error> {
        if let Some(known) = self.find(&request.container) {
            known.set_rate(request.bytes_per_second);
            return Ok(());
        }
        let connections = self.upstreams.connections()?;
        let container = Arc::new(Container::new(
            request.container.clone(),
            self.upstreams.clone(),
            connections,
            request.bytes_per_second,
        ));
        let serving = tokio::spawn(serve(listener, container.clone(), self.events.clone()));
        let serving = serving.abort_handle();
        let opened = Opened { container, serving };
        self.open.lock().insert(request.container.clone(), opened);
        Ok(())
    }

    /// Lets a run's requests pass. What cannot be done is told to the driver.
    pub fn grant(&self, request: &GrantRequest) {
        if let Err(refused) = self.try_grant(request) {
            let message = polydev_proto::error::chain(&refused);
            let (container, run_id) = (request.container.clone(), request.run_id.clone());
            self.events.refused(container, run_id, message);
        }
    }

    fn try_grant(&self, request: &GrantRequest) -> Result<(), Refused> {
        let container = self.find(&request.container).ok_or(Refused::Unknown)?;
        let run_id = &request.run_id;
        let keys = self.key.open_keys(&request.sealed_keys, run_id)?;
        let grant = Grant::new(run_id.clone(), &keys, container.over().clone())?;
        container.grant(grant)?;
        container.set_rate(request.bytes_per_second);
        Ok(())
    }

    /// Ends the run of a container.
    pub fn revoke(&self, container: &str) {
        if let Some(container) = self.find(container) {
            container.revoke();
        }
    }

    /// Forgets a container, and closes its socket.
    pub fn close(&self, container: &str) {
        self.open.lock().remove(container);
    }

    fn find(&self, name: &str) -> Option<Arc<Container>> {
        let open = self.open.lock();
        open.get(name).map(|known| known.container.clone())
    }
}
