//! The connection to a shim, and who its caller is.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use polydev_proto::{
    error::chain,
    runtime::{AttachStart, RunStart, runtime_service_client::RuntimeServiceClient},
};
use polydev_transport::{address::Address, tls::Trust};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::timeout;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataMap, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use crate::run::Run;

/// For a connection to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Between pings, and for the answer to one: the machine at the other end may have died.
const ALIVE_INTERVAL: Duration = Duration::from_secs(20);

/// Every call of `polydev.runtime.v1`.
pub type Calls = RuntimeServiceClient<InterceptedService<Channel, Added>>;

/// Who the caller is, as far as the connection does not say it.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// Whom it believes, and its certificate; for an address that begins with `https`.
    pub tls: Option<Trust>,
    /// A token, sent with each call.
    pub token: Option<Token>,
}

/// A token (RFC 6750) that some issuer has made out for the caller.
#[derive(Debug, Clone)]
pub enum Token {
    Fixed(Arc<SecretString>),
    /// Read again for each call: somebody renews it there.
    File(PathBuf),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[error("no shim answers at {address}: {reason}")]
pub struct Error {
    pub address: Address,
    pub reason: String,
}

/// A connection to a shim, or to whatever stands in front of several; clones share it. When it
/// breaks, the next call makes a new one.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
    added: Added,
}

impl Client {
    /// # Errors
    /// [`Error`], also if nobody answers within 10 s.
    ///
    /// # Cancel safety
    /// Leaves nothing.
    pub async fn connect(address: &Address, identity: Identity) -> Result<Self, Error> {
        let Identity { tls, token } = identity;
        let connect = address.connect(tls.as_ref(), |endpoint| {
            endpoint
                .connect_timeout(CONNECT_TIMEOUT)
                .http2_keep_alive_interval(ALIVE_INTERVAL)
                .keep_alive_timeout(ALIVE_INTERVAL)
        });
        let connected = match timeout(CONNECT_TIMEOUT, connect).await {
            Ok(connected) => connected.map_err(|error| chain(&*error)),
            Err(_) => Err("no connection in 10 s".into()),
        };
        let channel = connected.map_err(|reason| Error {
            address: address.clone(),
            reason,
        })?;
        let added = Added {
            token,
            metadata: MetadataMap::new(),
        };
        Ok(Self { channel, added })
    }

    /// Sent with each call besides, such as the place in a trace: `traceparent`.
    #[must_use]
    pub fn with_metadata(mut self, metadata: MetadataMap) -> Self {
        self.added.metadata = metadata;
        self
    }

    /// Every call of the API, as it is.
    #[must_use]
    pub fn calls(&self) -> Calls {
        RuntimeServiceClient::with_interceptor(self.channel.clone(), self.added.clone())
    }

    /// Runs a command. Without a `run_id` it gets one here, of this machine's clock, so that it is
    /// started once however often the connection breaks. One that is given may have been tried
    /// before, by another process: every node is asked first, unless `attempt` is 1, which says
    /// that it was not. Nothing is sent before its events are asked for.
    #[must_use]
    pub fn run(&self, start: RunStart) -> Run {
        Run::start(self.calls(), start)
    }

    /// Goes on with a run, from those offsets.
    #[must_use]
    pub fn attach(&self, start: AttachStart) -> Run {
        Run::attach(self.calls(), start)
    }
}

/// What goes with each call.
#[derive(Debug, Clone)]
pub struct Added {
    token: Option<Token>,
    metadata: MetadataMap,
}

impl Added {
    fn bearer(&self) -> Result<Option<MetadataValue<Ascii>>, String> {
        let text: SecretString = match &self.token {
            None => return Ok(None),
            Some(Token::Fixed(token)) => SecretString::clone(token),
            Some(Token::File(path)) => fs::read_to_string(path)
                .map_err(|error| format!("cannot read the token in `{}`: {error}", path.display()))?
                .into(),
        };
        let header = SecretString::from(format!("Bearer {}", text.expose_secret().trim()));
        let value = MetadataValue::try_from(header.expose_secret());
        let mut value = value.map_err(|_| "the token is not of printable ASCII")?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

impl Interceptor for Added {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = self.metadata.clone().into_headers();
        request.metadata_mut().as_mut().extend(metadata);
        if let Some(value) = self.bearer().map_err(Status::unauthenticated)? {
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}
