//! Users' credentials, while the shim has them: for one call, or to take one back.
//!
//! [`Credential`] is one in the clear. [`Source`] is how a caller names one, and [`Vault`]
//! gets it from there: out of a [`record`], or an earlier system's [`scrypt`] record, with a
//! master key of [`keys`], or out of the [`store`]. What the provider's CLI [`refreshed`] in a
//! container goes back into the store.

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

/// Where a caller says that a credential is.
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
    /// # Errors
    /// [`Invalid`]
    pub fn parse(message: runtime::Credential) -> Result<Self, Invalid> {
        match message.source {
            None => Err(invalid(
                "source",
                "is missing: `secret`, `sealed_record`, `scrypt_record` or `stored`",
            )),
            Some(credential::Source::Secret(secret)) => Ok(Self::Given(Credential::parse(secret)?)),
            Some(credential::Source::SealedRecord(record)) if record.len() > record::MOST => {
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
