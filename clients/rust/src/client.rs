//! The connection to a shim, and the identity of its caller.

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

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two pings, and for the answer to a ping: the machine at the other end may have
/// died.
const ALIVE_INTERVAL: Duration = Duration::from_secs(20);

/// Every call of `polydev.runtime.v1`.
pub type Calls = RuntimeServiceClient<InterceptedService<Channel, Added>>;

/// The identity of the caller, for connections that do not show it themselves.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// Which shims the caller trusts, and its certificate. Required for an `https` address.
    pub tls: Option<Trust>,
    /// A token, sent with each call.
    pub token: Option<Token>,
}

/// A bearer token (RFC 6750) that an issuer has issued to the caller.
#[derive(Debug, Clone)]
pub enum Token {
    Fixed(Arc<SecretString>),
    /// The file is read again for each call, because tokens are renewed.
    File(PathBuf),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[error("no shim answers at {address}: {reason}")]
pub struct Error {
    pub address: Address,
    pub reason: String,
}

/// A connection to a shim, or to a proxy in front of several shims; clones share it. When the
/// connection breaks, the next call makes a new one.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
    added: Added,
}

impl Client {
    /// # Errors
    /// [`Error`], also if no shim answers within 10 s.
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

    /// Sets metadata that is sent with each call, such as the trace context (`traceparent`).
    #[must_use]
    pub fn with_metadata(mut self, metadata: MetadataMap) -> Self {
        self.added.metadata = metadata;
        self
    }

    /// The generated client, which has every call of the API.
    #[must_use]
    pub fn calls(&self) -> Calls {
        RuntimeServiceClient::with_interceptor(self.channel.clone(), self.added.clone())
    }

    /// Runs a command. If `run_id` is empty, the client makes one from this machine's clock, so
    /// that the command is started once, however often the connection breaks. A given `run_id` may
    /// have been tried before by another process, so the shim asks every node first. `attempt` 1
    /// says that the id was never tried, and the shim does not ask. The client sends nothing until
    /// the caller asks for the events.
    #[must_use]
    pub fn run(&self, start: RunStart) -> Run {
        Run::start(self.calls(), start)
    }

    /// Continues a run from the given offsets.
    #[must_use]
    pub fn attach(&self, start: AttachStart) -> Run {
        Run::attach(self.calls(), start)
    }
}

/// Token and metadata for each call.
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
        let mut value = value.map_err(|_| "the token must be printable ASCII")?;
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
