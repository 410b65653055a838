//! A run's secrets on their way: sealed by whoever has them to the one container that may
//! use them. Whoever relays them cannot read them.
//!
//! HPKE (RFC 9180), base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20Poly1305;
//! `info` is [`INFO`], the associated data the run's id. On the wire it is the encapsulated
//! key, 32 bytes, and then the ciphertext of one [`Secrets`] with its tag.

use bytes::Bytes;
use hpke::{
    Deserializable, Kem as _, OpModeR, OpModeS, Serializable, aead::ChaCha20Poly1305,
    kdf::HkdfSha256, kem::X25519HkdfSha256, single_shot_open, single_shot_seal,
};
use prost::Message;
use zeroize::Zeroizing;

use crate::init::{MAX_SECRETS, Secrets};

type Kem = X25519HkdfSha256;

const INFO: &[u8] = b"polydev.init.v1 secrets";
const ENCAPSULATED_KEY: usize = 32;

/// Why secrets cannot be sealed or opened; never quotes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the container's public key is not one of X25519")]
    PublicKey,
    #[error("the secrets take more than {MAX_SECRETS} bytes")]
    TooLong,
    #[error("the secrets are not sealed to this container and this run")]
    NotForUs,
    #[error("what was sealed are no secrets")]
    Malformed,
}

/// The key of one container. It is in the memory of its init alone, and wiped when dropped.
pub struct ContainerKey {
    private: <Kem as hpke::Kem>::PrivateKey,
    public: <Kem as hpke::Kem>::PublicKey,
}

impl ContainerKey {
    /// A new one, from the kernel's randomness.
    #[must_use]
    pub fn generate() -> Self {
        let (private, public) = Kem::gen_keypair();
        Self { private, public }
    }

    /// The half that may be told: 32 bytes.
    #[must_use]
    pub fn public(&self) -> Bytes {
        Bytes::copy_from_slice(&self.public.to_bytes())
    }

    /// Opens what [`seal`] made. The values are wiped when the last of them is dropped.
    ///
    /// # Errors
    /// [`Error::NotForUs`] if it was sealed to another container or for another run, or
    /// changed on the way; [`Error::Malformed`].
    pub fn open(&self, sealed: &[u8], run_id: &str) -> Result<Secrets, Error> {
        let (key, ciphertext) = sealed
            .split_at_checked(ENCAPSULATED_KEY)
            .ok_or(Error::NotForUs)?;
        let key = Deserializable::from_bytes(key).map_err(|_| Error::NotForUs)?;
        let opened = single_shot_open::<ChaCha20Poly1305, HkdfSha256, Kem>(
            &OpModeR::Base,
            &self.private,
            &key,
            INFO,
            ciphertext,
            run_id.as_bytes(),
        );
        let opened = Zeroizing::new(opened.map_err(|_| Error::NotForUs)?);
        // The fields are slices of this one buffer.
        Secrets::decode(Bytes::from_owner(opened)).map_err(|_| Error::Malformed)
    }
}

impl std::fmt::Debug for ContainerKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ContainerKey").finish_non_exhaustive()
    }
}

/// Seals a run's secrets to the container with this public key.
///
/// # Errors
/// [`Error::PublicKey`], [`Error::TooLong`]
pub fn seal(public_key: &[u8], run_id: &str, secrets: &Secrets) -> Result<Bytes, Error> {
    let public_key = Deserializable::from_bytes(public_key).map_err(|_| Error::PublicKey)?;
    if secrets.encoded_len() > MAX_SECRETS {
        return Err(Error::TooLong);
    }
    let plain = Zeroizing::new(secrets.encode_to_vec());
    let (key, ciphertext) = single_shot_seal::<ChaCha20Poly1305, HkdfSha256, Kem>(
        &OpModeS::Base,
        &public_key,
        INFO,
        &plain,
        run_id.as_bytes(),
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
        }
    }

    #[test]
    fn secrets_are_for_one_container_and_one_run() {
        let (ours, other) = (ContainerKey::generate(), ContainerKey::generate());
        let sealed = seal(&ours.public(), "run", &secrets()).unwrap();
        assert_eq!(ours.open(&sealed, "run").unwrap(), secrets());
        assert_eq!(other.open(&sealed, "run"), Err(Error::NotForUs));
        assert_eq!(ours.open(&sealed, "another"), Err(Error::NotForUs));
        assert!(!sealed.windows(7).any(|seven| seven == b"hunter2"));
    }

    #[test]
    fn what_was_changed_or_cut_on_the_way_is_refused() {
        let key = ContainerKey::generate();
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
        let key = ContainerKey::generate().public();
        assert_eq!(seal(&key, "run", &long), Err(Error::TooLong));
        long.files[0].content.truncate(MAX_SECRETS - 100);
        assert!(seal(&key, "run", &long).unwrap().len() <= MAX_SEALED);
    }

    proptest! {
        #[test]
        fn any_bytes_are_opened_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(ContainerKey::generate().open(&bytes, "run").is_err());
        }
    }
}
