//! A sealed record: one credential of one user for one provider, under a master key.
//!
//! AES-256-GCM with a random nonce of 12 bytes. The associated data bind the record to tenant,
//! user, provider and version. Tenant, user and provider each follow their length, which is 8
//! bytes in big-endian order. The version is 8 bytes in big-endian order. On the wire and in the
//! store this is one [`Record`].

use aes_gcm::{
    Aes256Gcm,
    aead::{Aead, KeyInit, Payload},
};
use polydev_proto::{id::UserId, provider::Vendor};
use prost::Message;
use secrecy::ExposeSecret;
use zeroize::Zeroizing;

use super::{
    Error,
    keys::{KeyRing, MasterKey},
};
use crate::secret::Credential;

/// The longest record, in bytes: the longest credential fits.
pub const MAX_RECORD: usize = 132 << 10;
/// The only tenant, until callers belong to several.
pub(super) const TENANT: &str = "default";

/// The fields of an encoded record.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Record {
    /// The id of the master key.
    #[prost(string, tag = "1")]
    pub key_id: String,
    #[prost(bytes = "vec", tag = "2")]
    pub nonce: Vec<u8>,
    /// Followed by the tag of 16 bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub ciphertext: Vec<u8>,
    /// The version of the user's credential for the provider: 1 or more, and higher for each
    /// replacement.
    #[prost(uint64, tag = "4")]
    pub version: u64,
}

/// The user and the provider that a record is for.
#[derive(Debug, Clone, Copy)]
pub struct Binding<'a> {
    pub user_id: &'a UserId,
    pub provider: Vendor,
}

impl Binding<'_> {
    fn associated_data(&self, version: u64) -> Vec<u8> {
        let mut data = Vec::new();
        for part in [TENANT, self.user_id.as_str(), self.provider.name()] {
            data.extend((part.len() as u64).to_be_bytes());
            data.extend(part.as_bytes());
        }
        data.extend(version.to_be_bytes());
        data
    }
}

impl Record {
    /// Seals `credential` with `key`.
    #[must_use]
    pub fn seal(credential: &Credential, binding: Binding, version: u64, key: &MasterKey) -> Self {
        Self::seal_with(credential, binding, version, key, rand::random())
    }

    fn seal_with(
        credential: &Credential,
        binding: Binding,
        version: u64,
        key: &MasterKey,
        nonce: [u8; 12],
    ) -> Self {
        let payload = Payload {
            msg: &credential.encode(),
            aad: &binding.associated_data(version),
        };
        let sealed =
            Aes256Gcm::new(key.bytes.expose_secret().into()).encrypt(&nonce.into(), payload);
        Self {
            key_id: key.id.clone(),
            nonce: nonce.into(),
            ciphertext: sealed.expect("a credential is far below the cipher's limit"),
            version,
        }
    }

    /// Decodes the bytes that [`Record::encode_to_vec`] made.
    ///
    /// # Errors
    /// [`Error::NotOpened`] if the bytes are not a record.
    pub fn read(bytes: &[u8]) -> Result<Self, Error> {
        Self::decode(bytes).map_err(|_| Error::NotOpened)
    }

    /// Opens the record, if it is for `binding`.
    ///
    /// # Errors
    /// [`Error::UnknownKey`]; [`Error::NotOpened`] if the record was changed or is not for
    /// `binding`.
    pub fn open(&self, binding: Binding, keys: &KeyRing) -> Result<Credential, Error> {
        let key = keys.find(&self.key_id).ok_or_else(|| Error::UnknownKey {
            key_id: self.key_id.clone(),
        })?;
        let nonce = self
            .nonce
            .as_slice()
            .try_into()
            .map_err(|_| Error::NotOpened)?;
        let payload = Payload {
            msg: &self.ciphertext,
            aad: &binding.associated_data(self.version),
        };
        let opened = Aes256Gcm::new(key.bytes.expose_secret().into()).decrypt(nonce, payload);
        let opened = Zeroizing::new(opened.map_err(|_| Error::NotOpened)?);
        Credential::decode(opened).ok_or(Error::NotOpened)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::keys::tests::ring;
    use proptest::prelude::*;

    fn credential() -> Credential {
        Credential::ApiKey {
            key: "hunter2".into(),
            project_id: None,
        }
    }

    fn binding<'a>(user_id: &'a UserId, provider: &str) -> Binding<'a> {
        Binding {
            user_id,
            provider: provider.parse().unwrap(),
        }
    }

    fn sealed() -> Record {
        Record::seal(
            &credential(),
            binding(&"alice".into(), "openai"),
            1,
            ring(&[1]).first(),
        )
    }

    #[test]
    fn a_record_opens_for_its_user_and_provider_alone() {
        let record = Record::read(&sealed().encode_to_vec()).unwrap();
        let opened = |user: &str, provider: &str, keys: &[u8]| {
            record.open(binding(&user.into(), provider), &ring(keys))
        };
        let found = opened("alice", "openai", &[2, 1]).unwrap();
        assert_eq!(found.encode(), credential().encode());
        assert!(matches!(
            opened("bob", "openai", &[1]),
            Err(Error::NotOpened)
        ));
        assert!(matches!(
            opened("alice", "google", &[1]),
            Err(Error::NotOpened)
        ));
        assert!(matches!(
            opened("alice", "openai", &[2]),
            Err(Error::UnknownKey { .. })
        ));
        // The same bytes with another boundary between user and provider do not open either.
        assert!(matches!(
            opened("aliceo", "openai", &[1]),
            Err(Error::NotOpened)
        ));
    }

    #[test]
    fn a_record_with_any_byte_changed_or_cut_off_does_not_open() {
        let bytes = sealed().encode_to_vec();
        let opens = |bytes: &[u8]| {
            let record = Record::read(bytes)?;
            record.open(binding(&"alice".into(), "openai"), &ring(&[1]))
        };
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(opens(&changed).is_err(), "byte {at}");
            assert!(opens(&bytes[..at]).is_err(), "cut at {at}");
        }
        let older = Record {
            version: 2,
            ..sealed()
        };
        assert!(matches!(
            older.open(binding(&"alice".into(), "openai"), &ring(&[1])),
            Err(Error::NotOpened)
        ));
    }

    /// Implementations in other languages can test themselves with this record.
    #[test]
    fn a_record_is_as_documented() {
        let mut key = String::new();
        (0..32u8).for_each(|byte| key.push_str(&hex::encode([byte])));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), key).unwrap();
        let ring = KeyRing::load(Some(file.path())).unwrap().unwrap();
        let nonce = *b"\xc0\xc1\xc2\xc3\xc4\xc5\xc6\xc7\xc8\xc9\xca\xcb";
        let record = Record::seal_with(
            &credential(),
            binding(&"alice".into(), "openai"),
            1,
            ring.first(),
            nonce,
        );
        assert_eq!(
            hex::encode(record.encode_to_vec()),
            include_str!("golden.hex").trim()
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(record) = Record::read(&bytes) {
                prop_assert!(record.open(binding(&"alice".into(), "openai"), &ring(&[1])).is_err());
            }
        }
    }
}
