//! Who has a container: a run with its keys, or nobody.

use std::fmt;

use http::{HeaderName, HeaderValue};
use polydev_proto::{
    broker::Keys,
    provider::{Provider, Unknown},
};
use tokio_util::sync::CancellationToken;

use crate::api::Api;

/// Why keys cannot be used. Never quotes them.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Provider(#[from] Unknown),
    #[error("the key for {0} contains bytes that no header can carry")]
    Unusable(Provider),
    #[error("there are two keys for {0}")]
    Twice(Provider),
}

/// The right of one run to use its keys, until it ends.
pub(crate) struct Grant {
    pub(crate) run_id: String,
    /// At most one for each provider.
    credentials: Vec<(Provider, HeaderName, HeaderValue)>,
    /// Cancelled when the run ends, for everything that is in progress.
    over: CancellationToken,
}

impl Grant {
    /// # Errors
    /// [`Error`]
    pub(crate) fn new(run_id: String, keys: &Keys, over: CancellationToken) -> Result<Self, Error> {
        let mut credentials: Vec<(Provider, _, _)> = Vec::new();
        for key in &keys.keys {
            let provider: Provider = key.provider.parse()?;
            if credentials.iter().any(|(known, _, _)| *known == provider) {
                return Err(Error::Twice(provider));
            }
            let (name, value) = Api::of(provider)
                .credential(&key.value)
                .ok_or(Error::Unusable(provider))?;
            credentials.push((provider, name, value));
        }
        Ok(Self {
            run_id,
            credentials,
            over,
        })
    }

    /// The header with the run's key for the provider, if it has one.
    pub(crate) fn credential(&self, provider: Provider) -> Option<(&HeaderName, &HeaderValue)> {
        let mut all = self.credentials.iter();
        let found = all.find(|(known, _, _)| *known == provider);
        found.map(|(_, name, value)| (name, value))
    }

    /// Waits until the run has ended. Cancel safe.
    pub(crate) fn over(&self) -> &CancellationToken {
        &self.over
    }
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { run_id, .. } = self;
        f.debug_struct("Grant")
            .field("run_id", run_id)
            .finish_non_exhaustive()
    }
}
