//! Ed25519 keys in PEM: a private key that signs, and public keys that verify.

use ring::{
    digest,
    signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey},
};
use rustls_pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer, pem::PemObject};

/// Most public keys of one file.
pub const MAX_KEYS: usize = 16;
/// A public key of Ed25519 in X.509's form begins with these bytes (RFC 8410, section 4).
const ED25519_SPKI: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];
const PUBLIC_KEY: usize = 32;

/// Text that is not a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoKey {
    #[error("the key must be an Ed25519 private key in PEM (`PRIVATE KEY`)")]
    Private,
    #[error("the keys must be Ed25519 public keys in PEM (`PUBLIC KEY`)")]
    Public,
    #[error("there are {0} public keys; allowed are 1 to {MAX_KEYS}")]
    Number(usize),
}

/// Why a signature does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotSigned {
    #[error("no public key has the id `{0}`")]
    UnknownKey(String),
    #[error("the signature is wrong")]
    Wrong,
}

/// A private key.
pub struct SigningKey {
    pair: Ed25519KeyPair,
    id: String,
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SigningKey").field(&self.id).finish()
    }
}

impl SigningKey {
    /// Reads a key, for example of `openssl genpkey -algorithm ed25519`.
    ///
    /// # Errors
    /// [`NoKey::Private`]
    pub fn read(pem: &[u8]) -> Result<Self, NoKey> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem).map_err(|_| NoKey::Private)?;
        // OpenSSL writes no public key beside it.
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der());
        let pair = pair.map_err(|_| NoKey::Private)?;
        let id = key_id(pair.public_key().as_ref());
        Ok(Self { pair, id })
    }

    /// The first 16 hexadecimal digits of the SHA-256 of the public key.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    #[must_use]
    pub fn sign(&self, bytes: &[u8]) -> Vec<u8> {
        self.pair.sign(bytes).as_ref().to_vec()
    }
}

/// Public keys by their ids.
#[derive(Debug, Clone)]
pub struct PublicKeys(Vec<(String, [u8; PUBLIC_KEY])>);

impl PublicKeys {
    /// Reads keys, for example of `openssl pkey -pubout`, one after the other.
    ///
    /// # Errors
    /// [`NoKey`]
    pub fn read(pem: &[u8]) -> Result<Self, NoKey> {
        let keys = SubjectPublicKeyInfoDer::pem_slice_iter(pem).map(|der| {
            let der = der.map_err(|_| NoKey::Public)?;
            let key = der.strip_prefix(&ED25519_SPKI).ok_or(NoKey::Public)?;
            let key: [u8; PUBLIC_KEY] = key.try_into().map_err(|_| NoKey::Public)?;
            Ok((key_id(&key), key))
        });
        let keys: Vec<_> = keys.collect::<Result<_, _>>()?;
        match keys.len() {
            1..=MAX_KEYS => Ok(Self(keys)),
            number => Err(NoKey::Number(number)),
        }
    }

    /// # Errors
    /// [`NotSigned`]
    pub fn verify(&self, key_id: &str, bytes: &[u8], signature: &[u8]) -> Result<(), NotSigned> {
        let known = self.0.iter().find(|(id, _)| id == key_id);
        let (_, key) = known.ok_or_else(|| NotSigned::UnknownKey(key_id.into()))?;
        let verified = UnparsedPublicKey::new(&ED25519, key).verify(bytes, signature);
        verified.map_err(|_| NotSigned::Wrong)
    }
}

fn key_id(public: &[u8]) -> String {
    let digest = digest::digest(&digest::SHA256, public);
    hex::encode(&digest.as_ref()[..8])
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::LazyLock;

    use base64::prelude::{BASE64_STANDARD, Engine};
    use ring::rand::SystemRandom;

    use super::*;

    /// A private key and its public key, in PEM.
    pub(crate) fn keys() -> &'static (String, String) {
        static KEYS: LazyLock<(String, String)> = LazyLock::new(|| {
            let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("random bytes");
            let pair = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).expect("its own form");
            let public = [&ED25519_SPKI, pair.public_key().as_ref()].concat();
            (
                pem("PRIVATE KEY", pkcs8.as_ref()),
                pem("PUBLIC KEY", &public),
            )
        });
        &KEYS
    }

    fn pem(kind: &str, der: &[u8]) -> String {
        let text = BASE64_STANDARD.encode(der);
        format!("-----BEGIN {kind}-----\n{text}\n-----END {kind}-----\n")
    }

    #[test]
    fn what_is_signed_is_verified_with_a_known_key_alone() {
        let (private, public) = keys();
        let key = SigningKey::read(private.as_bytes()).unwrap();
        let keys = PublicKeys::read(public.as_bytes()).unwrap();
        let signature = key.sign(b"text");
        keys.verify(key.id(), b"text", &signature).unwrap();
        assert_eq!(
            keys.verify(key.id(), b"texts", &signature),
            Err(NotSigned::Wrong)
        );
        let unknown = keys.verify("0", b"text", &signature);
        assert_eq!(unknown, Err(NotSigned::UnknownKey("0".into())));
        assert!(!format!("{key:?}").contains(&private[30..40]));
    }

    #[test]
    fn keys_are_read_from_pem_alone() {
        let (private, public) = keys();
        let read = |text: &str| PublicKeys::read(text.as_bytes());
        assert_eq!(read(&public.repeat(2)).unwrap().0.len(), 2);
        assert_eq!(read("").unwrap_err(), NoKey::Number(0));
        assert_eq!(read(private).unwrap_err(), NoKey::Number(0));
        assert_eq!(
            SigningKey::read(public.as_bytes()).unwrap_err(),
            NoKey::Private
        );
        assert_eq!(
            read(&public.repeat(MAX_KEYS + 1)).unwrap_err(),
            NoKey::Number(17)
        );
    }
}
