//! Users' credentials, while the shim has them: during one call, or to take one back.
//!
//! [`Credential`] is a credential in the clear. [`Source`] says where a caller's credential is,
//! and [`Vault`] gets the credential from there: from a [`record`] or an earlier system's
//! [`scrypt`] record, which a master key of [`keys`] opens, or from the [`store`]. An account that
//! the provider's CLI has [`refreshed`] in a container goes back into the store.

pub mod keys;
mod label;
pub mod record;
pub mod refreshed;
pub mod scrypt;
pub mod store;
mod vault;

pub use vault::{Error, Vault};

use bytes::Bytes;
use polydev_proto::runtime::{self, credential};

use crate::secret::{Credential, Invalid, invalid};

/// Where a caller's credential is.
#[derive(Debug)]
pub enum Source {
    /// In the call, in the clear.
    Given(Credential),
    /// In the call, sealed; see [`record`].
    Sealed(Bytes),
    /// In the call, sealed by an earlier system.
    Scrypt(scrypt::Record),
    /// In the store.
    Stored,
}

impl Source {
    /// Whether the caller has the credential in the clear.
    #[must_use]
    pub fn is_given(&self) -> bool {
        matches!(self, Self::Given(_))
    }

    /// Whether it may be anybody's: records of earlier systems are bound to no user.
    #[must_use]
    pub fn is_unbound(&self) -> bool {
        matches!(self, Self::Scrypt(_))
    }

    /// # Errors
    /// [`Invalid`]
    pub fn parse(message: runtime::Credential) -> Result<Self, Invalid> {
        match message.source {
            None => Err(invalid(
                "source",
                "is missing: allowed are `secret`, `sealed_record`, `scrypt_record` and `stored`",
            )),
            Some(credential::Source::Secret(secret)) => Ok(Self::Given(Credential::parse(secret)?)),
            Some(credential::Source::SealedRecord(record)) if record.len() > record::MAX_RECORD => {
                Err(invalid("sealed_record", "is longer than 135168 bytes"))
            }
            Some(credential::Source::SealedRecord(record)) => Ok(Self::Sealed(record)),
            Some(credential::Source::ScryptRecord(record)) => {
                Ok(Self::Scrypt(scrypt::Record::parse(&record)?))
            }
            Some(credential::Source::Stored(_)) => Ok(Self::Stored),
        }
    }
}
