//! Getting a credential from where its caller says it is, and keeping those of the store.

use std::{path::Path, time::SystemTime};

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

/// Records that are sealed anew in one call.
const AT_ONCE: u32 = 50;
/// How often a credential is put, while others put the same one.
pub(super) const TRIES: u32 = 5;

/// A shim's master keys and its store, if it has them.
#[derive(Debug)]
pub struct Vault {
    keys: Option<KeyRing>,
    store: Option<Store>,
    scrypt: scrypt::Opener,
}

/// Why there is no credential; never quotes one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this shim has no master key, so it opens and seals no record")]
    NoKeys,
    #[error("this shim has no credential store")]
    NoStore,
    #[error("the record is sealed with master key `{key_id}`, which this shim does not have")]
    UnknownKey { key_id: String },
    #[error(
        "the record does not open: it was changed, or sealed with another key or for another \
         user or provider"
    )]
    NotOpened,
    #[error("there is no credential of user `{user_id}` for `{provider}` in the store")]
    NotFound {
        user_id: String,
        provider: &'static str,
    },
    #[error("the credential of user `{user_id}` for `{provider}` is being changed by others")]
    Contended {
        user_id: String,
        provider: &'static str,
    },
    #[error("the record opens, and what is in it is no credential")]
    NotUnderstood,
    #[error("`keep_refreshed` is for an account that has signed in (`oauth_file`) alone")]
    NoAccount,
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// Why there is no vault.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Keys(#[from] keys::Error),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(
        "a credential store needs a master key: --master-key-file, systemd's credential `polydev-master-keys` or ENCRYPTION_MASTER_KEY"
    )]
    NoKeys,
}

/// How far a rotation has come.
#[derive(Debug)]
pub struct Rotated {
    /// Sealed anew by this call.
    pub sealed: u32,
    /// Still to do, those that failed among them.
    pub left: u64,
    /// Those that could not be, and why.
    pub failed: Vec<(Info, Error)>,
    /// User and provider of the last that was looked at, if there may be others behind it.
    pub next: Option<(String, String)>,
}

impl Vault {
    /// Reads the master keys. The store is not asked for anything yet.
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
        run_id: &str,
    ) -> Result<Prepared, Error> {
        let Source::Stored = source else {
            let credential = self.get(source, binding).await?;
            return Ok(binding.provider.prepare(&credential)?);
        };
        let row = self.stored(binding).await?;
        let credential = open(&row, binding, self.keys()?)?;
        let mut prepared = binding.provider.prepare(&credential)?;
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
            Source::Scrypt(record) => self.scrypt.open(&record, self.keys()?).await,
            Source::Stored => open(&self.stored(binding).await?, binding, self.keys()?),
        }
    }

    async fn stored(&self, binding: Binding<'_>) -> Result<Row, Error> {
        let found = self.store()?.get(binding.user_id, binding.provider).await?;
        found.ok_or_else(|| not_found(binding))
    }

    /// Keeps a credential, in place of the one there was; and, if it is an account's and
    /// `keep_refreshed`, what runs refresh of it.
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
        // One that no run could use is not kept.
        binding.provider.prepare(&credential)?;
        for _ in 0..TRIES {
            let before = store.get(binding.user_id, binding.provider).await?;
            let before = before.map(|before| before.info);
            let replaces = before.as_ref().map(|before| before.version);
            let version = replaces.map_or(1, |replaced| replaced + 1);
            let key = self.keys()?.first();
            let now = SystemTime::now();
            let info = Info {
                user_id: binding.user_id.into(),
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
            user_id: binding.user_id.into(),
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

    /// Seals some records of other keys with the first one, those behind `after`.
    ///
    /// # Errors
    /// [`Error`] if the store fails; those before are sealed anew.
    pub async fn rotate(&self, after: Option<(String, String)>) -> Result<Rotated, Error> {
        let (store, keys) = (self.store()?, self.keys()?);
        let key = keys.first();
        let (rows, before) = store
            .sealed_otherwise(&key.id, after.as_ref(), AT_ONCE)
            .await?;
        let last = rows.last().filter(|_| rows.len() == AT_ONCE as usize);
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

    /// Wipes what has been kept for long enough, for ever.
    pub async fn keep(&self) {
        self.scrypt.keep().await;
    }
}

fn not_found(binding: Binding) -> Error {
    Error::NotFound {
        user_id: binding.user_id.into(),
        provider: binding.provider.name(),
    }
}

/// The same with the first key.
fn reseal(row: &Row, keys: &KeyRing) -> Result<Record, Error> {
    // A provider that this version does not have is nobody's here.
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

/// Opens what stands in the store, if it is of the version that stands beside it.
fn open(row: &Row, binding: Binding, keys: &KeyRing) -> Result<Credential, Error> {
    let record = Record {
        version: row.info.version,
        ..Record::read(&row.record)?
    };
    record.open(binding, keys)
}
