//! Signs what may start, for drivers that require execution tokens.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use polydev_proto::{
    execution::{self, Because, Place},
    node::{Claim, ExecutionToken},
    signing::{NoKey, SigningKey},
};
use polydev_transport::reload::Reloaded;

use crate::private;

/// The private key of a shim. Without one, nothing is signed.
#[derive(Debug, Clone, Default)]
pub struct Signer(Option<Arc<(PathBuf, Reloaded<SigningKey>)>>);

/// A run that was allowed: its claims are signed.
#[derive(Debug, Clone)]
pub struct Permission {
    /// The run may wait for a slot longer than the key is valid.
    key: Arc<(PathBuf, Reloaded<SigningKey>)>,
    /// Of the policy that has allowed it; empty if roles alone have.
    policy_hash: String,
    /// Who has approved it; empty if the policy required no approval.
    approver: String,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot use the signing key")]
    File(#[from] private::Error),
    #[error("the signing key `{}` is not valid", path.display())]
    Malformed { path: PathBuf, source: NoKey },
}

impl Signer {
    /// Reads a private key, and reads it again when its file changes.
    ///
    /// # Errors
    /// [`Error`]
    pub fn load(path: &Path) -> Result<Self, Error> {
        let key = Reloaded::new(vec![path.to_owned()], || read(path))?;
        Ok(Self(Some(Arc::new((path.to_owned(), key)))))
    }

    /// For a run that roles, and the policy if there is one, have allowed.
    #[must_use]
    pub fn permission(&self, policy_hash: Option<&str>) -> Option<Permission> {
        let key = self.0.clone()?;
        Some(Permission {
            key,
            policy_hash: policy_hash.unwrap_or_default().into(),
            approver: String::new(),
        })
    }
}

impl Permission {
    /// For a run that somebody has approved.
    pub fn approved_by(&mut self, approver: &str) {
        self.approver = approver.into();
    }

    /// A token for this claim as it is, with the key that the file has now.
    #[must_use]
    pub fn sign(&self, claim: &Claim, place: Place) -> ExecutionToken {
        let (path, key) = &*self.key;
        let (key, refused) = key.get(|| read(path));
        if let Some(error) = refused {
            let error = crate::chain(&error);
            tracing::warn!(
                error,
                "cannot use the new signing key, keeping the previous one"
            );
        }
        let because = Because {
            policy_hash: &self.policy_hash,
            approver: &self.approver,
        };
        execution::issue(&key, claim, place, because)
    }
}

/// Reads a private key, which only its owner and one group may read.
///
/// # Errors
/// [`Error`]
pub fn read(path: &Path) -> Result<SigningKey, Error> {
    let pem = private::read(path)?;
    SigningKey::read(&pem).map_err(|source| Error::Malformed {
        path: path.into(),
        source,
    })
}
