//! Accounts that a provider's CLI refreshes in a run, taken back into the store.
//!
//! The file comes sealed, through a driver, and maybe to another shim than the one that sent
//! it. So the key it is sealed to is made of a master key, which all shims have, and of the
//! [`Label`] that says what was sent: whoever changes one cannot have the other, and a node can
//! give back nothing but what it was given, for the run that it was given for.
//!
//! A run's file takes the place of the one that the run got, or of what the run itself gave
//! back before, and of no other. That which is told for the n-th time has the version n higher
//! than what was given, so that the same may come twice, late, or to many shims.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    future::pending,
    sync::Arc,
    time::{Duration, SystemTime},
};

use polydev_proto::{
    init::{Refreshable, Refreshed},
    node::{WatchRefreshedRequest, node_service_client::NodeServiceClient},
    sealed::{self, PrivateKey},
};
use prost::Message;
use ring::hkdf;
use secrecy::{ExposeSecret, SecretSlice};
use serde::de::IgnoredAny;
use tokio::time::sleep;
use tonic::{Code, Status, transport::Channel};
use zeroize::Zeroizing;

use super::{
    Credential,
    keys::MasterKey,
    record::{Binding, Record},
    store::{Info, Row},
    vault::{self, TRIES, Vault, open},
};

const SALT: &[u8] = b"polydev refreshed account";
/// A run tells no more often than every ten seconds.
const COUNT_MOST: u64 = 1 << 32;
/// Between two tries to listen to a driver, or to reach the store.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_secs(30);
/// Some ten minutes: a driver keeps it no longer.
const RETRIES: u32 = 24;

/// What was sent to which run.
#[derive(Clone, PartialEq, Eq, Message)]
struct Label {
    /// Of the master key that the key is made of.
    #[prost(string, tag = "1")]
    key_id: String,
    #[prost(string, tag = "2")]
    user_id: String,
    #[prost(string, tag = "3")]
    provider: String,
    #[prost(string, tag = "4")]
    run_id: String,
    #[prost(uint64, tag = "5")]
    version: u64,
    /// When the first was put: versions begin anew after a deletion.
    #[prost(message, optional, tag = "6")]
    created_at: Option<prost_types::Timestamp>,
}

/// Why a file is not taken back; never quotes it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("its label is none")]
    Label,
    #[error(transparent)]
    NotOpened(#[from] sealed::Error),
    #[error("it is another kind of file than the one that it takes the place of")]
    OtherKind,
    #[error("the credential was changed or deleted meanwhile")]
    Superseded,
    #[error(transparent)]
    Vault(#[from] vault::Error),
}

/// What asks for the account's file that `info` is of, should the run refresh it.
pub(super) fn refreshable(
    info: &Info,
    binding: Binding,
    run_id: &str,
    key: &MasterKey,
) -> Refreshable {
    let label = Label {
        key_id: key.id.clone(),
        user_id: info.user_id.clone(),
        provider: info.provider.clone(),
        run_id: run_id.to_owned(),
        version: info.version,
        created_at: Some(info.created_at.into()),
    };
    let label = label.encode_to_vec();
    Refreshable {
        path: binding.provider.account_file().to_owned(),
        public_key: private_key(key, &label).public(),
        label: label.into(),
    }
}

/// What opens a file with this label.
fn private_key(key: &MasterKey, label: &[u8]) -> PrivateKey {
    let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, SALT);
    let made = salt.extract(key.bytes.expose_secret());
    let mut seed = Zeroizing::new([0; 32]);
    made.expand(&[label], hkdf::HKDF_SHA256)
        .and_then(|made| made.fill(&mut *seed))
        .expect("so many bytes are one block of SHA-256");
    PrivateKey::derive(&*seed)
}

impl Vault {
    /// Takes a file back. `None` if it has been taken back before.
    ///
    /// # Errors
    /// [`Error`]; nothing is changed then.
    pub async fn take_back(&self, refreshed: &Refreshed) -> Result<Option<Info>, Error> {
        let label = Label::decode(&*refreshed.label).map_err(|_| Error::Label)?;
        let (keys, store) = (self.keys()?, self.store()?);
        let key = keys.find(&label.key_id);
        let key = key.ok_or_else(|| vault::Error::UnknownKey {
            key_id: label.key_id.clone(),
        })?;
        let file = private_key(key, &refreshed.label)
            .open_refreshed(&refreshed.sealed, &refreshed.label)?;
        // From here on the label is one that a shim has made.
        if !(1..=COUNT_MOST).contains(&file.count) {
            return Err(Error::Label);
        }
        let version = label.version + file.count;
        let binding = Binding {
            user_id: &label.user_id,
            provider: label.provider.parse().map_err(|_| Error::Label)?,
        };
        let content: SecretSlice<u8> = file.content.to_vec().into();
        let credential = Credential::OauthFile(content.clone());
        credential.check().map_err(vault::Error::from)?;
        for _ in 0..TRIES {
            let row = store.get(binding.user_id, binding.provider);
            let row = row.await.map_err(vault::Error::from)?;
            let row = row.ok_or(Error::Superseded)?;
            match label.standing(&row.info, version) {
                Standing::Next => {}
                Standing::Known => return Ok(None),
                Standing::Superseded => return Err(Error::Superseded),
            }
            match open(&row, binding, keys)? {
                Credential::OauthFile(before) if has_members_of(&before, &content) => {}
                _ => return Err(Error::OtherKind),
            }
            let (replaces, key) = (row.info.version, keys.first());
            let info = Info {
                version,
                key_id: key.id.clone(),
                updated_at: SystemTime::now(),
                refreshed_by: label.run_id.clone(),
                ..row.info
            };
            let record = Record::seal(&credential, binding, version, key).encode_to_vec();
            let row = Row { info, record };
            let put = store.put(&row, Some(replaces)).await;
            if put.map_err(vault::Error::from)? {
                return Ok(Some(row.info));
            }
        }
        Err(Error::Superseded)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Standing {
    Next,
    Known,
    Superseded,
}

impl Label {
    /// Of that which would have `version`, beside what the store has.
    fn standing(&self, info: &Info, version: u64) -> Standing {
        let is_ours = info.refreshed_by == self.run_id;
        let created_at = Some(info.created_at.into());
        match info.version {
            _ if !info.keep_refreshed || created_at != self.created_at => Standing::Superseded,
            now if is_ours && now >= version => Standing::Known,
            now if is_ours || now == self.version => Standing::Next,
            _ => Standing::Superseded,
        }
    }
}

/// Whether nothing is missing at the top of the new object that was in the old one: what a tool
/// leaves when somebody signs out, or a command of the user's own writes, is no account.
fn has_members_of(old: &SecretSlice<u8>, new: &SecretSlice<u8>) -> bool {
    type Members = BTreeMap<String, IgnoredAny>;
    let members = |file: &SecretSlice<u8>| serde_json::from_slice(file.expose_secret());
    match (members(old), members(new)) {
        (Ok::<Members, _>(old), Ok::<Members, _>(new)) => {
            old.keys().all(|name| new.contains_key(name))
        }
        _ => false,
    }
}

/// Takes back what the runs of one node refresh, for as long as it is polled.
pub async fn follow(vault: Arc<Vault>, node_id: String, channel: Channel) -> Infallible {
    if !vault.has_store() {
        return pending().await;
    }
    loop {
        if let Err(status) = follow_once(&vault, channel.clone()).await {
            tracing::debug!(node_id, %status, "a node does not tell what its runs refresh");
            // A driver of an earlier version.
            if status.code() == Code::Unimplemented {
                return pending().await;
            }
        }
        sleep(RETRY.mul_f64(rand::random_range(0.5..1.0))).await;
    }
}

async fn follow_once(vault: &Vault, channel: Channel) -> Result<(), Status> {
    let mut client = NodeServiceClient::new(channel);
    let told = client.watch_refreshed(WatchRefreshedRequest {}).await?;
    let mut told = told.into_inner();
    while let Some(told) = told.message().await? {
        if let Some(refreshed) = told.refreshed {
            take_back(vault, &told.run_id, &refreshed).await;
        }
    }
    Ok(())
}

/// Takes one back, when the store can be reached.
async fn take_back(vault: &Vault, run_id: &str, refreshed: &Refreshed) {
    let mut wait = RETRY;
    for retry in 0.. {
        let error = match vault.take_back(refreshed).await {
            Ok(Some(info)) => {
                let Info {
                    user_id,
                    provider,
                    version,
                    ..
                } = info;
                return tracing::info!(run_id, user_id, provider, version, "account refreshed");
            }
            Ok(None) => return,
            Err(error) => error,
        };
        let may_pass = match &error {
            Error::Vault(vault::Error::Store(error)) => error.may_pass(),
            _ => false,
        };
        let reason = crate::chain(&error);
        match (may_pass && retry < RETRIES, error) {
            (true, _) => tracing::warn!(run_id, reason, "an account waits for the store"),
            (false, Error::Superseded) => {
                return tracing::info!(run_id, reason, "a refreshed account is not kept");
            }
            (false, _) => {
                return tracing::warn!(run_id, reason, "a refreshed account is not kept");
            }
        }
        sleep(wait.mul_f64(rand::random_range(0.5..1.0))).await;
        wait = RETRY_MOST.min(wait * 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::keys::tests::ring;
    use polydev_proto::{init::RefreshedFile, sealed::seal_refreshed};

    fn info(version: u64) -> Info {
        Info {
            user_id: "alice".into(),
            provider: "openai".into(),
            version,
            kind: 2,
            key_id: String::new(),
            created_at: SystemTime::UNIX_EPOCH + Duration::from_secs(1),
            updated_at: SystemTime::UNIX_EPOCH,
            keep_refreshed: true,
            refreshed_by: String::new(),
        }
    }

    fn label() -> Label {
        Label {
            run_id: "run".into(),
            version: 3,
            created_at: Some(info(3).created_at.into()),
            ..Label::default()
        }
    }

    #[test]
    fn a_run_replaces_what_it_got_and_what_it_gave_back_and_nothing_else() {
        let by = |run: &str, version| Info {
            refreshed_by: run.into(),
            ..info(version)
        };
        let given = info(3);
        assert_eq!(label().standing(&given, 4), Standing::Next);
        // Some told before may have been passed over.
        assert_eq!(label().standing(&given, 6), Standing::Next);
        assert_eq!(label().standing(&by("run", 4), 5), Standing::Next);
        for again in [4, 3] {
            assert_eq!(label().standing(&by("run", 4), again), Standing::Known);
        }
        let deleted = Info {
            created_at: SystemTime::UNIX_EPOCH,
            ..info(3)
        };
        let not_kept = Info {
            keep_refreshed: false,
            ..info(3)
        };
        for other in [info(4), by("another", 4), info(2), deleted, not_kept] {
            assert_eq!(label().standing(&other, 5), Standing::Superseded);
        }
    }

    #[test]
    fn whoever_changes_the_label_cannot_seal_for_it() {
        let keys = ring(&[1]);
        let binding = Binding {
            user_id: "alice",
            provider: "openai".parse().unwrap(),
        };
        let asked = refreshable(&info(3), binding, "run", keys.first());
        let of = Label::decode(&*asked.label).unwrap();
        assert_eq!((&*of.user_id, of.version), ("alice", 3));
        let opened = |label: &[u8]| {
            let file = RefreshedFile::default();
            let sealed = seal_refreshed(&asked.public_key, label, &file).unwrap();
            let key = private_key(keys.first(), label);
            key.open_refreshed(&sealed, label)
        };
        assert!(opened(&asked.label).is_ok());
        for other in [
            Label {
                user_id: "bob".into(),
                ..of.clone()
            },
            Label { version: 4, ..of },
        ] {
            assert!(opened(&other.encode_to_vec()).is_err());
        }
    }

    #[test]
    fn what_lacks_something_is_no_account() {
        let fits = |old: &str, new: &str| {
            let file = |text: &str| text.as_bytes().to_vec().into();
            has_members_of(&file(old), &file(new))
        };
        let old = r#"{"tokens":{"a":1},"last_refresh":"x"}"#;
        assert!(fits(old, r#"{"last_refresh":"y","tokens":{},"new":[]}"#));
        assert!(!fits(old, r#"{"tokens":{}}"#));
        assert!(!fits(old, "{}"));
        assert!(!fits(old, r#"{"tokens":{"#));
    }
}
