//! Secrets in transit. Their owner seals a run's secrets to the one container that may use
//! them. Init seals a refreshed account file in return. Relays cannot read either.
//!
//! HPKE (RFC 9180), base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20Poly1305.
//! The wire format is the encapsulated key (32 bytes) followed by the ciphertext of one
//! message with its tag. For [`Secrets`], `info` is [`SECRETS`] and the associated data is
//! the run's id. For a [`RefreshedFile`], they are [`REFRESHED`] and the label that came
//! with the key. For the keys of a broker, they are `KEYS` and the run's id.

use bytes::Bytes;
use hpke::{
    Deserializable, Kem as _, OpModeR, OpModeS, Serializable, aead::ChaCha20Poly1305,
    kdf::HkdfSha256, kem::X25519HkdfSha256, single_shot_open, single_shot_seal,
};
use prost::Message;
use zeroize::Zeroizing;

#[cfg(feature = "broker")]
use crate::broker::{Keys, MAX_KEYS};
use crate::init::{MAX_REFRESHED, MAX_SECRETS, RefreshedFile, Secrets};

type Kem = X25519HkdfSha256;

const SECRETS: &[u8] = b"polydev.init.v1 secrets";
const REFRESHED: &[u8] = b"polydev.init.v1 refreshed";
#[cfg(feature = "broker")]
const KEYS: &[u8] = b"polydev.broker.v1 keys";
const ENCAPSULATED_KEY: usize = 32;

/// Why secrets cannot be sealed or opened; never quotes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the public key is not a valid X25519 key")]
    PublicKey,
    #[error("the secrets exceed {MAX_SECRETS} bytes, or a file exceeds {MAX_REFRESHED} bytes")]
    TooLong,
    #[error("the secrets were not sealed for this container and run, or not for this label")]
    NotForUs,
    #[error("the sealed data does not contain secrets")]
    Malformed,
}

/// A key that opens sealed data: of one container, in the memory of its init alone, or of
/// whoever wants a file back. Wiped when dropped.
pub struct PrivateKey {
    private: <Kem as hpke::Kem>::PrivateKey,
    public: <Kem as hpke::Kem>::PublicKey,
}

impl PrivateKey {
    /// Generates a key from the kernel's random numbers.
    #[must_use]
    pub fn generate() -> Self {
        let (private, public) = Kem::gen_keypair();
        Self { private, public }
    }

    /// Derives the key of a secret seed of at least 32 bytes.
    #[must_use]
    pub fn derive(seed: &[u8]) -> Self {
        let (private, public) = Kem::derive_keypair(seed);
        Self { private, public }
    }

    /// The public key, 32 bytes.
    #[must_use]
    pub fn public(&self) -> Bytes {
        Bytes::copy_from_slice(&self.public.to_bytes())
    }

    /// Opens what [`seal`] made. The values are wiped when the last of them is dropped.
    ///
    /// # Errors
    /// [`Error::NotForUs`] if it was sealed for another container or run, or changed in
    /// transit; [`Error::Malformed`].
    pub fn open(&self, sealed: &[u8], run_id: &str) -> Result<Secrets, Error> {
        self.open_message(SECRETS, sealed, run_id.as_bytes())
    }

    /// Opens what [`seal_refreshed`] made. The content is wiped when dropped.
    ///
    /// # Errors
    /// [`Error::NotForUs`] if it was sealed for another key or label, or changed in
    /// transit; [`Error::Malformed`].
    pub fn open_refreshed(&self, sealed: &[u8], label: &[u8]) -> Result<RefreshedFile, Error> {
        self.open_message(REFRESHED, sealed, label)
    }

    /// Opens what [`seal_keys`] made. The values are wiped when the last of them is dropped.
    ///
    /// # Errors
    /// [`Error::NotForUs`] if they were sealed for another broker or run, or changed in
    /// transit; [`Error::Malformed`].
    #[cfg(feature = "broker")]
    pub fn open_keys(&self, sealed: &[u8], run_id: &str) -> Result<Keys, Error> {
        self.open_message(KEYS, sealed, run_id.as_bytes())
    }

    fn open_message<M: Message + Default>(
        &self,
        info: &[u8],
        sealed: &[u8],
        associated: &[u8],
    ) -> Result<M, Error> {
        let (key, ciphertext) = sealed
            .split_at_checked(ENCAPSULATED_KEY)
            .ok_or(Error::NotForUs)?;
        let key = Deserializable::from_bytes(key).map_err(|_| Error::NotForUs)?;
        let opened = single_shot_open::<ChaCha20Poly1305, HkdfSha256, Kem>(
            &OpModeR::Base,
            &self.private,
            &key,
            info,
            ciphertext,
            associated,
        );
        let opened = Zeroizing::new(opened.map_err(|_| Error::NotForUs)?);
        // The fields are slices of this one buffer.
        M::decode(Bytes::from_owner(opened)).map_err(|_| Error::Malformed)
    }
}

impl std::fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PrivateKey").finish_non_exhaustive()
    }
}

/// Seals a run's secrets to the container with this public key.
///
/// # Errors
/// [`Error::PublicKey`], [`Error::TooLong`]
pub fn seal(public_key: &[u8], run_id: &str, secrets: &Secrets) -> Result<Bytes, Error> {
    if secrets.encoded_len() > MAX_SECRETS {
        return Err(Error::TooLong);
    }
    seal_message(public_key, SECRETS, secrets, run_id.as_bytes())
}

/// Seals a file to the sender of this public key and label.
///
/// # Errors
/// [`Error::PublicKey`], [`Error::TooLong`]
pub fn seal_refreshed(
    public_key: &[u8],
    label: &[u8],
    file: &RefreshedFile,
) -> Result<Bytes, Error> {
    if file.content.len() > MAX_REFRESHED {
        return Err(Error::TooLong);
    }
    seal_message(public_key, REFRESHED, file, label)
}

/// Seals a run's keys to the broker with this public key.
///
/// # Errors
/// [`Error::PublicKey`], [`Error::TooLong`]
#[cfg(feature = "broker")]
pub fn seal_keys(public_key: &[u8], run_id: &str, keys: &Keys) -> Result<Bytes, Error> {
    if keys.encoded_len() > MAX_KEYS {
        return Err(Error::TooLong);
    }
    seal_message(public_key, KEYS, keys, run_id.as_bytes())
}

fn seal_message(
    public_key: &[u8],
    info: &[u8],
    message: &impl Message,
    associated: &[u8],
) -> Result<Bytes, Error> {
    let public_key = Deserializable::from_bytes(public_key).map_err(|_| Error::PublicKey)?;
    let plain = Zeroizing::new(message.encode_to_vec());
    let (key, ciphertext) = single_shot_seal::<ChaCha20Poly1305, HkdfSha256, Kem>(
        &OpModeS::Base,
        &public_key,
        info,
        &plain,
        associated,
    )
    .map_err(|_| Error::PublicKey)?;
    Ok([&key.to_bytes()[..], &ciphertext].concat().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::{File, MAX_SEALED, Variable};
    use proptest::prelude::*;

    fn secrets() -> Secrets {
        Secrets {
            env: vec![Variable {
                name: "KEY".into(),
                value: "hunter2".into(),
            }],
            files: vec![File {
                path: ".cli/auth.json".into(),
                mode: 0o600,
                content: "{}".into(),
            }],
            refreshable: None,
        }
    }

    #[test]
    fn secrets_are_for_one_container_and_one_run() {
        let (ours, other) = (PrivateKey::generate(), PrivateKey::generate());
        let sealed = seal(&ours.public(), "run", &secrets()).unwrap();
        assert_eq!(ours.open(&sealed, "run").unwrap(), secrets());
        assert_eq!(other.open(&sealed, "run"), Err(Error::NotForUs));
        assert_eq!(ours.open(&sealed, "another"), Err(Error::NotForUs));
        assert!(!sealed.windows(7).any(|seven| seven == b"hunter2"));
    }

    #[test]
    fn a_file_comes_back_to_the_seed_and_label_that_asked_for_it() {
        let file = RefreshedFile {
            count: 1,
            content: "hunter2".into(),
        };
        let asked = PrivateKey::derive(&[7; 32]);
        let sealed = seal_refreshed(&asked.public(), b"label", &file).unwrap();
        let again = PrivateKey::derive(&[7; 32]);
        assert_eq!(again.open_refreshed(&sealed, b"label").unwrap(), file);
        assert_eq!(
            again.open_refreshed(&sealed, b"other"),
            Err(Error::NotForUs)
        );
        let other = PrivateKey::derive(&[8; 32]);
        assert_eq!(
            other.open_refreshed(&sealed, b"label"),
            Err(Error::NotForUs)
        );
        // Nor can it be opened as secrets of a run.
        assert_eq!(again.open(&sealed, "label"), Err(Error::NotForUs));
        let long = RefreshedFile {
            content: vec![0; MAX_REFRESHED + 1].into(),
            ..file
        };
        assert_eq!(
            seal_refreshed(&asked.public(), b"label", &long),
            Err(Error::TooLong)
        );
    }

    #[test]
    fn what_was_changed_or_cut_on_the_way_is_refused() {
        let key = PrivateKey::generate();
        let sealed = seal(&key.public(), "run", &secrets()).unwrap();
        for at in 0..sealed.len() {
            let mut changed = sealed.to_vec();
            changed[at] ^= 1;
            assert_eq!(key.open(&changed, "run"), Err(Error::NotForUs), "byte {at}");
            assert_eq!(key.open(&sealed[..at], "run"), Err(Error::NotForUs));
        }
    }

    #[test]
    fn what_cannot_be_sealed_is_refused() {
        for key in [&[][..], &[0; 32], &[1; 31]] {
            assert_eq!(seal(key, "run", &secrets()), Err(Error::PublicKey));
        }
        let mut long = secrets();
        long.files[0].content = vec![0; MAX_SECRETS].into();
        let key = PrivateKey::generate().public();
        assert_eq!(seal(&key, "run", &long), Err(Error::TooLong));
        long.files[0].content.truncate(MAX_SECRETS - 100);
        assert!(seal(&key, "run", &long).unwrap().len() <= MAX_SEALED);
    }

    proptest! {
        #[test]
        fn any_bytes_are_opened_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(PrivateKey::generate().open(&bytes, "run").is_err());
        }
    }
}
