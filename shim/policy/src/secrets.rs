//! Secrets that issuer and verifier share, for signatures with HMAC-SHA256.

use std::fmt;

use ring::hmac;

/// The only algorithm.
pub const ALGORITHM: &str = "hmac-sha256";
/// Shortest secret, in bytes.
pub const MIN_SECRET: usize = 16;

/// The first secret signs, and all verify, so that a secret can be replaced.
#[derive(Clone)]
pub struct Secrets(Vec<Secret>);

#[derive(Clone)]
struct Secret {
    key: hmac::Key,
    id: String,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|secret| &secret.id))
            .finish()
    }
}

/// Why there are no secrets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoSecret {
    #[error("the secret of execution tokens is missing")]
    Missing,
    #[error("the secret of execution tokens has {0} bytes, at least {MIN_SECRET} are required")]
    Short(usize),
}

impl Secrets {
    /// Reads one secret a line.
    ///
    /// # Errors
    /// [`NoSecret`]
    pub fn read(text: &str) -> Result<Self, NoSecret> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let secrets: Vec<_> = lines
            .map(|line| match line.len() {
                MIN_SECRET.. => Ok(Secret::new(line.as_bytes())),
                length => Err(NoSecret::Short(length)),
            })
            .collect::<Result<_, _>>()?;
        if secrets.is_empty() {
            return Err(NoSecret::Missing);
        }
        Ok(Self(secrets))
    }

    /// A secret of the golden vectors, which is shorter than [`MIN_SECRET`].
    #[cfg(test)]
    pub(crate) fn golden(text: &str) -> Self {
        Self(vec![Secret::new(text.as_bytes())])
    }

    /// The id of the secret that signs.
    #[must_use]
    pub fn key_id(&self) -> &str {
        &self.0[0].id
    }

    /// Hexadecimal digits.
    #[must_use]
    pub fn sign(&self, text: &str) -> String {
        hex::encode(hmac::sign(&self.0[0].key, text.as_bytes()))
    }

    /// Whether one of the secrets, with this id if there is one, has signed the text.
    #[must_use]
    pub fn verify(&self, text: &str, signature: &str, key_id: Option<&str>) -> bool {
        let Ok(signature) = hex::decode(signature) else {
            return false;
        };
        self.0.iter().any(|secret| {
            let is_named = key_id.is_none_or(|id| id == secret.id);
            is_named && hmac::verify(&secret.key, text.as_bytes(), &signature).is_ok()
        })
    }
}

impl Secret {
    fn new(bytes: &[u8]) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, bytes);
        // Says which secret it is, and nothing else.
        let id = hmac::sign(&key, b"polydev execution token key id");
        let id = hex::encode(&id.as_ref()[..4]);
        Self { key, id }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_can_be_replaced_and_is_not_shown() {
        let old = Secrets::read("the old secret of this test").unwrap();
        let both =
            Secrets::read("the new secret of this test\nthe old secret of this test").unwrap();
        assert!(both.verify("text", &old.sign("text"), Some(old.key_id())));
        assert!(!old.verify("text", &both.sign("text"), None));
        assert!(!both.verify("text", &old.sign("text"), Some(both.key_id())));
        assert!(!both.verify("text", "not digits", None));
        assert!(!format!("{both:?}").contains("secret of"));
    }

    #[test]
    fn weak_secrets_are_refused() {
        assert_eq!(Secrets::read(" \n").unwrap_err(), NoSecret::Missing);
        assert_eq!(
            Secrets::read("golden_secret").unwrap_err(),
            NoSecret::Short(13)
        );
    }
}
