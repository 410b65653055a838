//! Records of earlier systems: AES-256-GCM with an IV of 16 bytes. scrypt derives the key from a
//! master key and the record's own salt. The shim only reads these records.

use std::{collections::HashMap, sync::Arc, time::Duration};

use aes_gcm::{
    AesGcm,
    aead::{Aead, KeyInit, array::typenum::U16},
    aes::Aes256,
};
use moka::future::Cache;
use parking_lot::Mutex;
use polydev_proto::{id::UserId, runtime};
use secrecy::{ExposeSecret, SecretBox, SecretString};
use tokio::{sync::Semaphore, task::spawn_blocking, time::timeout};
use zeroize::Zeroizing;

use super::{
    Error,
    keys::{KeyRing, LENGTH, MasterKey},
};
use crate::secret::{Credential, Invalid, invalid};

/// The largest number of hexadecimal digits of a ciphertext.
const MAX_DIGITS: usize = 16 << 10;
/// The logarithm of scrypt's parameter N, 16,384.
const LOG_N: u8 = 14;
/// How many derived keys are kept, and for how long.
const MAX_KEPT: u64 = 1000;
const KEPT_TIMEOUT: Duration = Duration::from_secs(10 * 60);
/// How many derivations run at a time. Each takes 16 MiB and about 50 ms of a core.
const MAX_AT_A_TIME: usize = 2;
/// How many derivations may wait for their turns, in all and for one user, and how long.
const MAX_WAITING: usize = 64;
const MAX_WAITING_OF_USER: usize = 4;
const TURN_TIMEOUT: Duration = Duration::from_secs(10);

/// A record, decoded from hexadecimal.
#[derive(Debug, PartialEq, Eq)]
pub struct Record {
    /// Followed by the tag.
    ciphertext: Vec<u8>,
    iv: [u8; 16],
    salt: [u8; 16],
}

/// The sealed content, unless it is only the key.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Content {
    api_key: SecretString,
    #[serde(default)]
    project_id: Option<String>,
}

impl Record {
    /// # Errors
    /// [`Invalid`] for the first field that is wrong.
    pub fn parse(record: &runtime::ScryptRecord) -> Result<Self, Invalid> {
        let field = |name: &str| format!("scrypt_record.{name}");
        let sixteen = |name, digits: &str| {
            let mut bytes = [0; 16];
            match hex::decode_to_slice(digits, &mut bytes) {
                Ok(()) => Ok(bytes),
                Err(_) => Err(invalid(field(name), "must be 32 hexadecimal digits")),
            }
        };
        if record.encrypted.len() > MAX_DIGITS {
            return Err(invalid(
                field("encrypted"),
                "is longer than 16384 characters",
            ));
        }
        let mut ciphertext = hex::decode(&record.encrypted)
            .map_err(|_| invalid(field("encrypted"), "is not hexadecimal"))?;
        ciphertext.extend(sixteen("auth_tag", &record.auth_tag)?);
        Ok(Self {
            ciphertext,
            iv: sixteen("iv", &record.iv)?,
            salt: sixteen("salt", &record.salt)?,
        })
    }
}

type Key = SecretBox<[u8; LENGTH]>;

/// Too many derivations wait for their turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "too many records of earlier systems are being opened: try again, or put the record into the \
     store"
)]
pub struct Busy;

/// Opens records, and keeps the derived keys for a while.
#[derive(Debug)]
pub struct Opener {
    /// By master key and salt.
    derived: Cache<(String, [u8; 16]), Arc<Key>>,
    turns: Arc<Semaphore>,
    /// Derivations that have not ended.
    waiting: Mutex<HashMap<UserId, usize>>,
}

/// A derivation of a user.
struct Waiting<'a> {
    opener: &'a Opener,
    user_id: &'a UserId,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut waiting = self.opener.waiting.lock();
        if let Some(count) = waiting.get_mut(self.user_id) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(self.user_id);
            }
        }
    }
}

impl Opener {
    #[must_use]
    pub fn new() -> Self {
        let derived = Cache::builder()
            .max_capacity(MAX_KEPT)
            .time_to_live(KEPT_TIMEOUT);
        Self {
            derived: derived.build(),
            turns: Arc::new(Semaphore::new(MAX_AT_A_TIME)),
            waiting: Mutex::default(),
        }
    }

    /// Opens a record for a user, with the first key that fits. Each try costs a derivation.
    ///
    /// # Errors
    /// [`Error::NotOpened`], [`Error::NotUnderstood`], [`Error::Busy`]
    pub async fn open(
        &self,
        record: &Record,
        keys: &KeyRing,
        user_id: &UserId,
    ) -> Result<Credential, Error> {
        // Old keys are at the end of the ring, and old records need old keys.
        for master in keys.iter().rev() {
            let key = self.derive(master, record.salt, user_id).await?;
            let cipher = AesGcm::<Aes256, U16>::new(key.expose_secret().into());
            if let Ok(opened) = cipher.decrypt(&record.iv.into(), &record.ciphertext[..]) {
                return content(&Zeroizing::new(opened)).ok_or(Error::NotUnderstood);
            }
        }
        Err(Error::NotOpened)
    }

    /// Wipes expired keys. Never returns. Without this, the cache wipes them only when it is used.
    pub async fn keep(&self) {
        loop {
            tokio::time::sleep(KEPT_TIMEOUT / 10).await;
            self.derived.run_pending_tasks().await;
        }
    }

    /// Derives a key once for all callers, as long as the key is kept.
    async fn derive(
        &self,
        master: &MasterKey,
        salt: [u8; 16],
        user_id: &UserId,
    ) -> Result<Arc<Key>, Busy> {
        let derive = async {
            let _waiting = self.wait(user_id)?;
            let turn = timeout(TURN_TIMEOUT, self.turns.clone().acquire_owned());
            let turn = turn.await.map_err(|_| Busy)?.expect("it is never closed");
            let master = SecretBox::new(Box::new(*master.bytes.expose_secret()));
            let derived = spawn_blocking(move || {
                // The derivation keeps its turn even if nobody waits for the result any more.
                let _turn = turn;
                SecretBox::init_with_mut(|key: &mut [u8; LENGTH]| {
                    let params = scrypt::Params::new(LOG_N, 8, 1).expect("they are allowed ones");
                    scrypt::scrypt(master.expose_secret(), &salt, &params, key)
                        .expect("32 bytes are an allowed length");
                })
            });
            Ok(Arc::new(derived.await.expect("scrypt does not panic")))
        };
        let key = (master.id.clone(), salt);
        let derived = self.derived.try_get_with(key, derive).await;
        derived.map_err(|busy: Arc<Busy>| *busy)
    }

    fn wait<'a>(&'a self, user_id: &'a UserId) -> Result<Waiting<'a>, Busy> {
        let mut waiting = self.waiting.lock();
        let of_user = waiting.get(user_id).copied().unwrap_or(0);
        if of_user >= MAX_WAITING_OF_USER || waiting.values().sum::<usize>() >= MAX_WAITING {
            return Err(Busy);
        }
        waiting.insert(user_id.clone(), of_user + 1);
        Ok(Waiting {
            opener: self,
            user_id,
        })
    }
}

impl Default for Opener {
    fn default() -> Self {
        Self::new()
    }
}

fn content(opened: &[u8]) -> Option<Credential> {
    let Content {
        api_key,
        project_id,
    } = match opened.first() {
        Some(b'{') => serde_json::from_slice(opened).ok()?,
        _ => Content {
            api_key: std::str::from_utf8(opened).ok()?.into(),
            project_id: None,
        },
    };
    let credential = Credential::ApiKey {
        key: api_key,
        project_id: project_id.filter(|project| !project.is_empty()),
    };
    credential.check().ok()?;
    Some(credential)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::keys::tests::ring;

    /// Master key 00..1f, salt a0..af, IV b0..bf; made with two other implementations.
    fn golden() -> runtime::ScryptRecord {
        let run = |from: u8| hex::encode((from..from + 16).collect::<Vec<_>>());
        runtime::ScryptRecord {
            encrypted: "030f94b89be85ed565a22426ded7fbd91d420878ee4bd2f7f32112de2d7e1dc8\
                        150cc1501d973a360f8d9620172ad0d0d5"
                .into(),
            iv: run(0xb0),
            auth_tag: "196ff94e14e80528928b6a0dc53d0279".into(),
            salt: run(0xa0),
        }
    }

    fn golden_ring() -> KeyRing {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), hex::encode((0..32).collect::<Vec<u8>>())).unwrap();
        KeyRing::load(Some(file.path())).unwrap().unwrap()
    }

    #[tokio::test]
    async fn a_record_of_an_earlier_system_opens() {
        let (opener, record) = (Opener::new(), Record::parse(&golden()).unwrap());
        let alice = UserId::from("alice");
        let opened = opener.open(&record, &golden_ring(), &alice).await.unwrap();
        match opened {
            Credential::ApiKey { key, project_id } => {
                // In two parts, because secret scanners would report the whole key.
                assert_eq!(key.expose_secret().strip_prefix("sk-"), Some("test123"));
                assert_eq!(project_id.as_deref(), Some("project-123"));
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(
            opener.open(&record, &ring(&[1]), &alice).await,
            Err(Error::NotOpened)
        ));
    }

    #[tokio::test]
    async fn a_record_with_any_byte_changed_does_not_open() {
        let opener = Opener::new();
        let (keys, alice) = (golden_ring(), UserId::from("alice"));
        let record = || Record::parse(&golden()).unwrap();
        // One byte of the salt is enough, because each try costs a derivation.
        let mut changed = record();
        changed.salt[0] ^= 1;
        assert!(opener.open(&changed, &keys, &alice).await.is_err());
        for at in 0..record().ciphertext.len() {
            let mut changed = record();
            changed.ciphertext[at] ^= 1;
            assert!(
                opener.open(&changed, &keys, &alice).await.is_err(),
                "byte {at}"
            );
        }
        for at in 0..16 {
            let mut changed = record();
            changed.iv[at] ^= 1;
            assert!(opener.open(&changed, &keys, &alice).await.is_err());
        }
    }

    #[tokio::test]
    async fn a_key_is_derived_once_for_all_who_open_a_record() {
        let (opener, keys) = (Opener::new(), golden_ring());
        let alice = UserId::from("alice");
        let derive = || opener.derive(keys.first(), [1; 16], &alice);
        let all = futures_util::future::join_all((0..20).map(|_| derive())).await;
        let first = all[0].clone().unwrap();
        for again in all {
            assert!(Arc::ptr_eq(&first, &again.unwrap()));
        }
        let other = opener.derive(keys.first(), [2; 16], &alice).await.unwrap();
        assert_ne!(first.expose_secret(), other.expose_secret());
    }

    #[tokio::test]
    async fn a_user_with_many_records_does_not_keep_others_waiting() {
        let (opener, keys) = (Opener::new(), golden_ring());
        let (alice, bob) = (UserId::from("alice"), UserId::from("bob"));
        let many = (0..100).map(|salt| opener.derive(keys.first(), [salt; 16], &alice));
        let many = futures_util::future::join_all(many);
        let one = opener.derive(keys.first(), [255; 16], &bob);
        let (many, one) = tokio::join!(many, one);
        one.unwrap();
        let opened = many.iter().filter(|derived| derived.is_ok()).count();
        assert_eq!(opened, MAX_WAITING_OF_USER);
        assert!(opener.waiting.lock().is_empty());
    }

    #[test]
    fn wrong_fields_are_named() {
        let refused = |change: fn(&mut runtime::ScryptRecord)| {
            let mut record = golden();
            change(&mut record);
            Record::parse(&record).unwrap_err().field
        };
        assert_eq!(
            refused(|r| r.encrypted.push('g')),
            "scrypt_record.encrypted"
        );
        assert_eq!(
            refused(|r| r.encrypted = "00".repeat(9000)),
            "scrypt_record.encrypted"
        );
        assert_eq!(refused(|r| r.iv.clear()), "scrypt_record.iv");
        assert_eq!(refused(|r| r.auth_tag.push('0')), "scrypt_record.auth_tag");
        assert_eq!(refused(|r| r.salt = "zz".repeat(16)), "scrypt_record.salt");
    }

    #[test]
    fn content_that_is_not_understood_is_refused() {
        assert!(content(b"key").is_some());
        assert!(content(br#"{"apiKey":"k"}"#).is_some());
        assert!(content(br#"{"apiKey":"k","projectId":null}"#).is_some());
        for wrong in [
            &b""[..],
            b"a\nb",
            b"{}",
            br#"{"apiKey":""}"#,
            br#"{"apiKey":"k","token":"t"}"#,
            b"\xff",
        ] {
            assert!(content(wrong).is_none());
        }
    }
}
