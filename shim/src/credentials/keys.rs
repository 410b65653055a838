//! Master keys, which seal records. The first key of a ring seals, every key opens.

use std::{fs, path::Path};

use secrecy::{ExposeSecret, SecretBox};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

/// The length of an AES-256 key, in bytes.
pub const LENGTH: usize = 32;
/// The largest number of keys in a ring. Old keys stay until no record needs them.
const MAX_KEYS: usize = 16;
/// The variable with one key, as in earlier systems.
const VARIABLE: &str = "ENCRYPTION_MASTER_KEY";
/// The name of the systemd credential.
const CREDENTIAL: &str = "polydev-master-keys";

/// One key, with an id derived from the key.
#[derive(Debug)]
pub struct MasterKey {
    /// 16 hexadecimal digits.
    pub id: String,
    pub(super) bytes: SecretBox<[u8; LENGTH]>,
}

/// The keys of a shim, at least one.
#[derive(Debug)]
pub struct KeyRing {
    keys: Vec<MasterKey>,
}

/// Why there are no keys. Never quotes a key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the master keys in {place}")]
    Unreadable {
        place: String,
        source: std::io::Error,
    },
    #[error("line {line} of the master keys in {place} must be 64 hexadecimal digits")]
    Malformed { place: String, line: usize },
    #[error("line {line} of the master keys in {place} repeats a key")]
    Repeated { place: String, line: usize },
    #[error("there are {count} master keys in {place}; must be 1 to {MAX_KEYS}")]
    Count { place: String, count: usize },
}

impl KeyRing {
    /// Loads the keys from `file` if given, else from systemd's credential
    /// `polydev-master-keys`, else from `ENCRYPTION_MASTER_KEY`. Each line has one key of 64
    /// hexadecimal digits, and the first key seals. Empty lines and lines that begin with `#` are
    /// ignored. `None` if none of the three exists.
    ///
    /// # Errors
    /// [`Error`]
    pub fn load(file: Option<&Path>) -> Result<Option<Self>, Error> {
        if let Some(file) = file {
            return Self::read(file).map(Some);
        }
        let folder = std::env::var_os("CREDENTIALS_DIRECTORY");
        let credential = folder.map(|folder| Path::new(&folder).join(CREDENTIAL));
        if let Some(credential) = credential.filter(|path| path.exists()) {
            return Self::read(&credential).map(Some);
        }
        match std::env::var(VARIABLE) {
            Ok(text) => Self::parse(&Zeroizing::new(text), VARIABLE.to_owned()).map(Some),
            Err(_) => Ok(None),
        }
    }

    fn read(file: &Path) -> Result<Self, Error> {
        let place = format!("`{}`", file.display());
        match fs::read_to_string(file) {
            Ok(text) => Self::parse(&Zeroizing::new(text), place),
            Err(source) => Err(Error::Unreadable { place, source }),
        }
    }

    fn parse(text: &str, place: String) -> Result<Self, Error> {
        let mut keys: Vec<MasterKey> = Vec::new();
        for (text, line) in text.lines().map(str::trim).zip(1..) {
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let mut malformed = false;
            let bytes = SecretBox::init_with_mut(|bytes: &mut [u8; LENGTH]| {
                malformed = hex::decode_to_slice(text, bytes).is_err();
            });
            if malformed {
                return Err(Error::Malformed { place, line });
            }
            let key = MasterKey::new(bytes);
            if keys.iter().any(|before| before.id == key.id) {
                return Err(Error::Repeated { place, line });
            }
            keys.push(key);
        }
        let count = keys.len();
        match count {
            1..=MAX_KEYS => Ok(Self { keys }),
            _ => Err(Error::Count { place, count }),
        }
    }

    /// The key that seals.
    #[must_use]
    pub fn first(&self) -> &MasterKey {
        &self.keys[0] // A ring has at least one key.
    }

    /// The key with this id.
    #[must_use]
    pub fn find(&self, id: &str) -> Option<&MasterKey> {
        self.keys.iter().find(|key| key.id == id)
    }

    /// All keys, beginning with the key that seals.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &MasterKey> {
        self.keys.iter()
    }
}

impl MasterKey {
    fn new(bytes: SecretBox<[u8; LENGTH]>) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"polydev master key id");
        hash.update(bytes.expose_secret());
        let id = hex::encode(&hash.finalize()[..8]);
        Self { id, bytes }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A ring of keys that are the given byte 32 times.
    pub(crate) fn ring(keys: &[u8]) -> KeyRing {
        let lines: Vec<_> = keys
            .iter()
            .map(|byte| hex::encode([*byte; LENGTH]))
            .collect();
        KeyRing::parse(&lines.join("\n"), "a test".into()).unwrap()
    }

    #[test]
    fn the_first_key_seals_and_its_name_is_made_of_it() {
        let text = format!(
            "# new\n{}\r\n\n  {}\n",
            hex::encode([1; LENGTH]).to_uppercase(),
            hex::encode([2; LENGTH])
        );
        let both = KeyRing::parse(&text, "a test".into()).unwrap();
        assert_eq!(both.first().id, ring(&[1]).first().id);
        assert_eq!(both.iter().count(), 2);
        assert!(both.find(&ring(&[2]).first().id).is_some());
        assert!(both.find(&ring(&[3]).first().id).is_none());
    }

    #[test]
    fn what_is_no_key_is_refused_by_line_and_not_quoted() {
        let key = hex::encode([1; LENGTH]);
        let refused = |text: &str| {
            let error = KeyRing::parse(text, "`file`".into())
                .unwrap_err()
                .to_string();
            assert!(!error.contains(&key[..60]), "{error}");
            error
        };
        assert!(refused(&format!("\n{}", &key[1..])).starts_with("line 2 of"));
        assert!(refused(&format!("{key}0")).starts_with("line 1 of"));
        assert!(
            refused(&format!("{key}\n{key}"))
                .contains("line 2 of the master keys in `file` repeats")
        );
        assert!(refused("# none\n").starts_with("there are 0"));
    }

    #[test]
    fn keys_are_never_printed() {
        let printed = format!("{:?}", ring(&[1]));
        assert!(
            !printed.contains(&hex::encode([1; 4])) && !printed.contains("1, 1"),
            "{printed}"
        );
    }
}
