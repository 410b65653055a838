//! Who has a container: a run with its keys, or nobody.

use std::fmt;

use http::{HeaderName, HeaderValue};
use polydev_proto::{
    broker::{Grant as Request, Keys},
    budget::Exhausted,
    egress::NotARule,
    provider::{NoVendor, Vendor},
};
use tokio_util::sync::CancellationToken;

use crate::{
    api::Api,
    container::Container,
    egress::Egress,
    reached::Reached,
    request::{Asked, Refusal},
    seen::Seen,
    upstream::{self, Connections},
};

/// Why keys cannot be used. Never quotes them.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Provider(#[from] NoVendor),
    #[error("the key for {0} contains bytes that no header can carry")]
    Unusable(Vendor),
    #[error("there are two keys for {0}")]
    Twice(Vendor),
    #[error(transparent)]
    Upstream(#[from] upstream::Error),
    #[error("a rule of the role's `egress`")]
    Egress(#[from] NotARule),
    #[error("the role says what the run may reach, and its container has a network")]
    HasNetwork,
}

/// The right of one run to use its keys, until it ends.
pub(crate) struct Grant {
    /// What the driver has sent, for the driver's next life.
    pub(crate) request: Request,
    /// At most one for each provider.
    access: Vec<Access>,
    /// What the run may reach through the broker beside its model. `None` if its container has a
    /// network interface.
    pub(crate) egress: Option<Egress>,
    /// Cancelled when the run ends, for everything that is in progress.
    over: CancellationToken,
    pub(crate) seen: Seen,
    pub(crate) reached: Reached,
}

/// A key, and the server that it is for.
pub(crate) struct Access {
    provider: Vendor,
    key: (HeaderName, HeaderValue),
    pub(crate) connections: Connections,
}

impl Grant {
    /// # Errors
    /// [`Error`]
    pub(crate) fn new(request: Request, keys: &Keys, container: &Container) -> Result<Self, Error> {
        let policy = request.policy.clone().unwrap_or_default();
        let upstreams = container.upstreams.with(&policy.upstreams)?;
        let egress = match (&container.egress, &policy.egress) {
            (None, Some(_)) => return Err(Error::HasNetwork),
            (of_pool, None) => of_pool.clone(),
            (Some(of_pool), Some(of_role)) => Some(of_pool.and(&of_role.allow)?),
        };
        let mut access: Vec<Access> = Vec::new();
        for key in &keys.keys {
            let provider: Vendor = key.provider.parse()?;
            if access.iter().any(|known| known.provider == provider) {
                return Err(Error::Twice(provider));
            }
            let api = Api::of(provider);
            let key = api.credential(&key.value);
            access.push(Access {
                provider,
                key: key.ok_or(Error::Unusable(provider))?,
                connections: upstreams.connect(api)?,
            });
        }
        let before = request.seen.as_ref();
        let reached = before.map(|seen| seen.destinations.clone());
        let (seen, reached) = (Seen::new(before), reached.unwrap_or_default());
        Ok(Self {
            reached: Reached::new(reached),
            request,
            access,
            egress,
            over: container.over().clone(),
            seen,
        })
    }

    pub(crate) fn run_id(&self) -> &str {
        &self.request.run_id
    }

    /// # Errors
    /// [`Refusal::NoKey`]
    pub(crate) fn access(&self, provider: Vendor) -> Result<&Access, Refusal> {
        let found = self.access.iter().find(|known| known.provider == provider);
        found.ok_or(Refusal::NoKey(provider))
    }

    /// Counts another request to a model, if the run's budget allows it.
    ///
    /// # Errors
    /// [`Exhausted`]
    pub(crate) fn ask(&self) -> Result<(), Exhausted> {
        let policy = self.request.policy.as_ref();
        self.seen
            .ask(policy.and_then(|policy| policy.budget.as_ref()))
    }

    /// Cancelled when the run has ended.
    pub(crate) fn over(&self) -> &CancellationToken {
        &self.over
    }
}

impl Access {
    /// What a container has asked for, with the key and without a body.
    ///
    /// # Errors
    /// [`Refusal::Path`]
    pub(crate) fn request(&self, asked: &Asked) -> Result<reqwest::Request, Refusal> {
        let url = format!("{}{}", self.connections.base_url, asked.path);
        let url = url.parse().map_err(|_| Refusal::Path {
            provider: self.provider,
            path: asked.path.clone(),
        })?;
        let mut request = reqwest::Request::new(asked.method.clone(), url);
        let headers = request.headers_mut();
        *headers = asked.headers.clone();
        for (name, value) in &self.connections.headers {
            headers.insert(name, value.clone());
        }
        let (name, key) = &self.key;
        headers.insert(name, key.clone());
        Ok(request)
    }
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grant")
            .field("run_id", &self.run_id())
            .finish_non_exhaustive()
    }
}
