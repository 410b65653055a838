//! Whether a claim has the execution token that this node requires.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use polydev_proto::{
    broker::Egress,
    execution::{Invalid, Permit, Presented},
    node::Claim,
    signing::{NoKey, PublicKeys},
};
use polydev_transport::reload::Reloaded;

/// The public keys of those who may sign tokens. Without keys, no token is required.
#[derive(Debug)]
pub struct Permits {
    /// See `node_identity`.
    audience: String,
    keys: Option<(PathBuf, Reloaded<PublicKeys>)>,
}

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the public keys of `execution_tokens`, `{}`", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("the public keys of `execution_tokens`, `{}`, are not valid", path.display())]
    Malformed { path: PathBuf, source: NoKey },
}

impl Permits {
    /// With a file of keys, a token is required. The file is read again when it changes.
    ///
    /// # Errors
    /// [`Error`]
    pub fn open(audience: &str, keys: Option<&Path>) -> Result<Self, Error> {
        let load = |path: &Path| {
            let keys = Reloaded::new(vec![path.to_owned()], || read(path))?;
            Ok((path.to_owned(), keys))
        };
        Ok(Self {
            audience: audience.into(),
            keys: keys.map(load).transpose()?,
        })
    }

    /// Takes the token out of a claim. Where none is required it is dropped: what it must fit is a
    /// hash over all of the claim.
    #[must_use]
    pub fn take(&self, claim: &mut Claim) -> Presented {
        match &self.keys {
            Some(_) => Presented::take(claim),
            None => Presented::default(),
        }
    }

    /// What is known of the token, for the journal; `None` if none is required.
    ///
    /// # Errors
    /// [`Invalid`]: nothing may run.
    pub fn check(
        &self,
        presented: &Presented,
        image: &str,
        egress: Option<&Egress>,
    ) -> Result<Option<Permit>, Invalid> {
        let Some((path, keys)) = &self.keys else {
            return Ok(None);
        };
        let (keys, refused) = keys.get(|| read(path));
        if let Some(error) = refused {
            let error = polydev_proto::error::chain(&error);
            tracing::warn!(error, "cannot use the new keys, keeping the previous ones");
        }
        let now = SystemTime::now();
        let permit = presented.check(&keys, &self.audience, image, egress, now)?;
        Ok(Some(permit))
    }
}

fn read(path: &Path) -> Result<PublicKeys, Error> {
    let pem = fs::read(path).map_err(|source| Error::Unreadable {
        path: path.into(),
        source,
    })?;
    PublicKeys::read(&pem).map_err(|source| Error::Malformed {
        path: path.into(),
        source,
    })
}
