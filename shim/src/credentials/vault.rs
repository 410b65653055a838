//! Gets credentials from where callers say that they are, and manages those in the store.

use std::{path::Path, time::SystemTime};

use polydev_proto::{
    id::{RunId, UserId},
    provider::Vendor,
    runtime::CredentialMode,
};
use prost::Message;

use super::{
    Source,
    keys::{self, KeyRing},
    label,
    record::{Binding, Record},
    scrypt,
    store::{self, Address, Filter, Info, Row, Store},
};
use crate::{
    provider::Cli,
    secret::{Credential, Invalid, Prepared},
};

/// The largest number of records that one call seals again.
const MAX_RESEALED: u32 = 50;
/// How often a put is tried, while other calls change the same credential.
pub(super) const MAX_TRIES: u32 = 5;

/// The master keys and the store of a shim. Both are optional.
#[derive(Debug)]
pub struct Vault {
    keys: Option<KeyRing>,
    store: Option<Store>,
    scrypt: scrypt::Opener,
}

/// Why there is no credential. Never quotes a credential.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this shim has no master key, so it cannot open or seal records")]
    NoKeys,
    #[error("this shim has no credential store")]
    NoStore,
    #[error("the record is sealed with master key `{key_id}`, which this shim does not have")]
    UnknownKey { key_id: String },
    #[error(
        "cannot open the record: it was changed, or sealed with another key or for another user or \
         provider"
    )]
    NotOpened,
    #[error("the store has no credential of user `{user_id}` for `{provider}`")]
    NotFound {
        user_id: UserId,
        provider: &'static str,
    },
    #[error("other calls are changing the credential of user `{user_id}` for `{provider}`")]
    Contended {
        user_id: UserId,
        provider: &'static str,
    },
    #[error("the record opens, but its content is not a valid credential")]
    NotUnderstood,
    #[error(
        "`keep_refreshed` is `true`: allowed only for an account that has signed in (`oauth_file`)"
    )]
    NoAccount,
    #[error(
        "`credential_mode` is CREDENTIAL_MODE_BROKER: allowed only for an API key without a project"
    )]
    NotForBroker,
    #[error(transparent)]
    Busy(#[from] scrypt::Busy),
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error(transparent)]
    Store(#[from] store::Error),
}

fn prepare(
    credential: &Credential,
    provider: Vendor,
    mode: CredentialMode,
) -> Result<Prepared, Error> {
    match (mode, credential) {
        (
            CredentialMode::Unspecified | CredentialMode::Broker,
            Credential::ApiKey {
                key,
                project_id: None,
            },
        ) => Ok(provider.prepare_outside(key)),
        (CredentialMode::Broker, _) => Err(Error::NotForBroker),
        (_, credential) => Ok(provider.prepare(credential)?),
    }
}

/// Why the vault cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Keys(#[from] keys::Error),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(
        "a credential store needs a master key: --master-key-file, systemd's credential \
         `polydev-master-keys` or ENCRYPTION_MASTER_KEY"
    )]
    NoKeys,
}

/// The progress of a rotation.
#[derive(Debug)]
pub struct Rotated {
    /// How many records this call sealed again.
    pub sealed: u32,
    /// How many records are left, including those that failed.
    pub left: u64,
    /// The records that could not be sealed again, and why.
    pub failed: Vec<(Info, Error)>,
    /// The user and provider of the last record of this call, if there may be records after it.
    pub next: Option<(UserId, String)>,
}

impl Vault {
    /// Reads the master keys. This call does not connect to the store.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn open(key_file: Option<&Path>, store: Option<&Address>) -> Result<Self, OpenError> {
        let keys = KeyRing::load(key_file)?;
        let store = store.map(Store::open).transpose()?;
        if store.is_some() && keys.is_none() {
            return Err(OpenError::NoKeys);
        }
        Ok(Self {
            keys,
            store,
            scrypt: scrypt::Opener::new(),
        })
    }

    pub(super) fn keys(&self) -> Result<&KeyRing, Error> {
        self.keys.as_ref().ok_or(Error::NoKeys)
    }

    pub(super) fn store(&self) -> Result<&Store, Error> {
        self.store.as_ref().ok_or(Error::NoStore)
    }

    pub(super) fn has_store(&self) -> bool {
        self.store.is_some()
    }

    /// Gets a credential for a run, in the form that the provider's CLI reads.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn prepare(
        &self,
        source: Source,
        binding: Binding<'_>,
        mode: CredentialMode,
        run_id: RunId,
    ) -> Result<Prepared, Error> {
        let Source::Stored = source else {
            let credential = self.get(source, binding).await?;
            return prepare(&credential, binding.provider, mode);
        };
        let row = self.stored(binding).await?;
        let credential = open(&row, binding, self.keys()?)?;
        let mut prepared = prepare(&credential, binding.provider, mode)?;
        if row.info.keep_refreshed {
            let key = self.keys()?.first();
            let asked = label::refreshable(&row.info, binding, run_id, key);
            prepared.refreshable = Some(asked);
        }
        Ok(prepared)
    }

    async fn get(&self, source: Source, binding: Binding<'_>) -> Result<Credential, Error> {
        match source {
            Source::Given(credential) => Ok(credential),
            Source::Sealed(record) => Record::read(&record)?.open(binding, self.keys()?),
            Source::Scrypt(record) => {
                let user_id = binding.user_id;
                self.scrypt.open(&record, self.keys()?, user_id).await
            }
            Source::Stored => open(&self.stored(binding).await?, binding, self.keys()?),
        }
    }

    async fn stored(&self, binding: Binding<'_>) -> Result<Row, Error> {
        let found = self.store()?.get(binding.user_id, binding.provider).await?;
        found.ok_or_else(|| not_found(binding))
    }

    /// Stores a credential in place of the previous one. With `keep_refreshed`, which only an
    /// account may have, the store will also keep what runs refresh of the account.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn put(
        &self,
        source: Source,
        binding: Binding<'_>,
        keep_refreshed: bool,
    ) -> Result<Info, Error> {
        let store = self.store()?;
        let credential = self.get(source, binding).await?;
        if keep_refreshed && !matches!(credential, Credential::OauthFile(_)) {
            return Err(Error::NoAccount);
        }
        // A credential that no run could use is not stored.
        binding.provider.prepare(&credential)?;
        for _ in 0..MAX_TRIES {
            let before = store.get(binding.user_id, binding.provider).await?;
            let before = before.map(|before| before.info);
            let replaces = before.as_ref().map(|before| before.version);
            let version = replaces.map_or(1, |replaced| replaced + 1);
            let key = self.keys()?.first();
            let now = SystemTime::now();
            let info = Info {
                user_id: binding.user_id.clone(),
                provider: binding.provider.name().into(),
                version,
                kind: credential.kind().into(),
                key_id: key.id.clone(),
                created_at: before.map_or(now, |before| before.created_at),
                updated_at: now,
                keep_refreshed,
                refreshed_by: String::new(),
            };
            let record = Record::seal(&credential, binding, version, key).encode_to_vec();
            let row = Row { info, record };
            if store.put(&row, replaces).await? {
                return Ok(row.info);
            }
        }
        Err(Error::Contended {
            user_id: binding.user_id.clone(),
            provider: binding.provider.name(),
        })
    }

    /// # Errors
    /// [`Error`]
    pub async fn list(&self, filter: &Filter, most: u32) -> Result<Vec<Info>, Error> {
        Ok(self.store()?.list(filter, most).await?)
    }

    /// # Errors
    /// [`Error`]
    pub async fn delete(&self, binding: Binding<'_>) -> Result<(), Error> {
        match self
            .store()?
            .delete(binding.user_id, binding.provider)
            .await?
        {
            true => Ok(()),
            false => Err(not_found(binding)),
        }
    }

    /// Seals some records of other keys with the first key, beginning after `after`.
    ///
    /// # Errors
    /// [`Error`] if the store fails. Earlier records of the call stay sealed with the first key.
    pub async fn rotate(&self, after: Option<(UserId, String)>) -> Result<Rotated, Error> {
        let (store, keys) = (self.store()?, self.keys()?);
        let key = keys.first();
        let (rows, before) = store
            .sealed_otherwise(&key.id, after.as_ref(), MAX_RESEALED)
            .await?;
        let last = rows.last().filter(|_| rows.len() == MAX_RESEALED as usize);
        let next = last.map(|row| (row.info.user_id.clone(), row.info.provider.clone()));
        let (mut sealed, mut failed) = (0, Vec::new());
        for row in rows {
            match reseal(&row, keys) {
                Ok(record) => {
                    let record = record.encode_to_vec();
                    let resealed = store.reseal(&row.info, &key.id, &record).await?;
                    sealed += u32::from(resealed);
                }
                Err(error) => failed.push((row.info, error)),
            }
        }
        Ok(Rotated {
            sealed,
            left: before.saturating_sub(sealed.into()),
            failed,
            next,
        })
    }

    /// Wipes expired keys. Never returns.
    pub async fn keep(&self) {
        self.scrypt.keep().await;
    }
}

fn not_found(binding: Binding) -> Error {
    Error::NotFound {
        user_id: binding.user_id.clone(),
        provider: binding.provider.name(),
    }
}

/// Seals the credential of a row with the first key.
fn reseal(row: &Row, keys: &KeyRing) -> Result<Record, Error> {
    // This version may not know the provider. Then it cannot open the record.
    let provider = row.info.provider.parse().map_err(|_| Error::NotOpened)?;
    let binding = Binding {
        user_id: &row.info.user_id,
        provider,
    };
    let credential = open(row, binding, keys)?;
    Ok(Record::seal(
        &credential,
        binding,
        row.info.version,
        keys.first(),
    ))
}

/// Opens the record in a row, if it has the version in the row.
fn open(row: &Row, binding: Binding, keys: &KeyRing) -> Result<Credential, Error> {
    let record = Record {
        version: row.info.version,
        ..Record::read(&row.record)?
    };
    record.open(binding, keys)
}
