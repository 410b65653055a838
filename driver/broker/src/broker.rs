//! Every container that is open, by name.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use polydev_proto::{
    broker::{Closed, Grant as GrantRequest, Granted, Keys, Open, Refused, from_broker},
    egress::NotARule,
    sealed::PrivateKey,
};
use tokio::{net::TcpListener, task::AbortHandle};

use crate::{
    changes::Changes,
    container::Container,
    egress::Egress,
    grant::Grant,
    serve::serve,
    upstream::{self, Upstreams},
};

/// The broker of one node.
#[derive(Debug)]
pub struct Broker {
    key: PrivateKey,
    upstreams: Upstreams,
    changes: Arc<Changes>,
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
        self.container.close();
    }
}

/// Why a container cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Upstream(#[from] upstream::Error),
    #[error("a rule of `egress.allow`")]
    Egress(#[from] NotARule),
}

/// Why a container cannot have a grant. Never quotes a key.
#[derive(Debug, thiserror::Error)]
enum NotGranted {
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
    /// A broker without containers, which opens what was sealed to `key`.
    #[must_use]
    pub fn new(key: PrivateKey, upstreams: Upstreams) -> Self {
        Self {
            key,
            upstreams,
            changes: Arc::default(),
            open: Mutex::default(),
        }
    }

    /// What keys are sealed to, 32 bytes.
    #[must_use]
    pub fn public_key(&self) -> Bytes {
        self.key.public()
    }

    /// The containers that are open, with the grants of their runs.
    #[must_use]
    pub fn held(&self) -> Vec<Open> {
        let open = self.open.lock();
        let held = open.values().map(|Opened { container, .. }| {
            let grant = container.granted().ok().map(|grant| GrantRequest {
                seen: container.seen(),
                ..grant.request.clone()
            });
            let open = container.request.clone();
            Open {
                bytes_per_second: (grant.as_ref())
                    .map_or(open.bytes_per_second, |grant| grant.bytes_per_second),
                grant,
                ..open
            }
        });
        held.collect()
    }

    /// Whether no container is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.open.lock().is_empty()
    }

    /// Serves what connects to `listener`, which is in the container. If a container of this
    /// name is open, it stays, with the new rate.
    ///
    /// # Errors
    /// [`Error`]
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn open(&self, request: &Open, listener: TcpListener) -> Result<(), Error> {
        if let Some(known) = self.find(&request.container) {
            known.set_rate(request.bytes_per_second);
            return Ok(());
        }
        let upstreams = self.upstreams.with(&request.upstreams)?;
        let egress = request.egress.as_ref();
        let egress = egress
            .map(|egress| Egress::new(&egress.allow))
            .transpose()?;
        let container = Arc::new(Container::new(
            request.clone(),
            upstreams,
            egress,
            self.changes.clone(),
        ));
        // Before the first request is read.
        if let Some(grant) = &request.grant
            && let Err(error) = self.give(&container, grant)
        {
            let error = polydev_proto::error::chain(&error);
            tracing::error!(
                run_id = grant.run_id,
                error,
                "a run has lost its keys and its connections"
            );
        }
        let serving = tokio::spawn(serve(listener, container.clone()));
        let serving = serving.abort_handle();
        let opened = Opened { container, serving };
        self.open.lock().insert(request.container.clone(), opened);
        Ok(())
    }

    /// Lets a run's requests pass. Returns what the driver is told.
    pub fn grant(&self, request: &GrantRequest) -> from_broker::Message {
        let container = request.container.clone();
        match self.try_grant(request) {
            Ok(()) => from_broker::Message::Granted(Granted { container }),
            Err(refused) => from_broker::Message::Refused(Refused {
                container,
                run_id: request.run_id.clone(),
                message: polydev_proto::error::chain(&refused),
            }),
        }
    }

    fn try_grant(&self, request: &GrantRequest) -> Result<(), NotGranted> {
        let container = self.find(&request.container).ok_or(NotGranted::Unknown)?;
        self.give(&container, request)
    }

    fn give(&self, container: &Container, request: &GrantRequest) -> Result<(), NotGranted> {
        let keys = match request.sealed_keys.is_empty() {
            true => Keys::default(),
            false => self.key.open_keys(&request.sealed_keys, &request.run_id)?,
        };
        let grant = Grant::new(request.clone(), &keys, container)?;
        container.grant(grant)?;
        container.set_rate(request.bytes_per_second);
        Ok(())
    }

    /// Ends a container's run, and closes its socket. Returns what the driver is told.
    pub fn close(&self, container: &str) -> from_broker::Message {
        let opened = self.open.lock().remove(container);
        from_broker::Message::Closed(Closed {
            container: container.to_owned(),
            seen: opened.and_then(|opened| opened.container.seen()),
        })
    }

    /// What is new of a run, for the driver. One caller at a time.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn news(&self) -> from_broker::Message {
        loop {
            let container = self.changes.next().await;
            if let Some(seen) = self.find(&container).and_then(|known| known.seen()) {
                return from_broker::Message::Seen(seen);
            }
        }
    }

    fn find(&self, name: &str) -> Option<Arc<Container>> {
        let open = self.open.lock();
        open.get(name).map(|known| known.container.clone())
    }
}
