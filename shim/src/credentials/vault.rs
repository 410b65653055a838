//! Getting a credential from where its caller says it is, and keeping those of the store.

use std::{path::Path, time::SystemTime};

use prost::Message;

use super::{
    Credential, Source,
    keys::{self, KeyRing},
    record::{Binding, Record},
    scrypt,
    store::{self, Address, Filter, Row, Store},
};

/// Records that are sealed anew in one call.
const AT_ONCE: u32 = 100;
/// How often a credential is put, while others put the same one.
const TRIES: u32 = 5;

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
    #[error("the credential of user `{user_id}` for `{provider}` cannot be sealed anew")]
    Rotation {
        user_id: String,
        provider: String,
        source: Box<Error>,
    },
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
#[derive(Debug, Clone, Copy)]
pub struct Rotated {
    /// Sealed anew by this call.
    pub sealed: u32,
    /// Still to do.
    pub left: u64,
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

    fn keys(&self) -> Result<&KeyRing, Error> {
        self.keys.as_ref().ok_or(Error::NoKeys)
    }

    fn store(&self) -> Result<&Store, Error> {
        self.store.as_ref().ok_or(Error::NoStore)
    }

    /// Gets a credential for a run.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn get(&self, source: Source, binding: Binding<'_>) -> Result<Credential, Error> {
        match source {
            Source::Given(credential) => Ok(credential),
            Source::Sealed(record) => Record::read(&record)?.open(binding, self.keys()?),
            Source::Scrypt(record) => self.scrypt.open(&record, self.keys()?).await,
            Source::Stored => {
                let found = self.store()?.get(binding.user_id, binding.provider).await?;
                let row = found.ok_or_else(|| not_found(binding))?;
                open(&row, binding, self.keys()?)
            }
        }
    }

    /// Keeps a credential, in place of the one there was.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn put(&self, source: Source, binding: Binding<'_>) -> Result<Row, Error> {
        let store = self.store()?;
        let credential = self.get(source, binding).await?;
        for _ in 0..TRIES {
            let before = store.get(binding.user_id, binding.provider).await?;
            let version = before.as_ref().map_or(1, |before| before.version + 1);
            let key = self.keys()?.first();
            let now = SystemTime::now();
            let row = Row {
                user_id: binding.user_id.into(),
                provider: binding.provider.name().into(),
                version,
                kind: credential.kind().into(),
                key_id: key.id.clone(),
                record: Record::seal(&credential, binding, version, key).encode_to_vec(),
                created_at: before.map_or(now, |before| before.created_at),
                updated_at: now,
            };
            if store.put(&row).await? {
                return Ok(row);
            }
        }
        Err(Error::Contended {
            user_id: binding.user_id.into(),
            provider: binding.provider.name(),
        })
    }

    /// # Errors
    /// [`Error`]
    pub async fn list(&self, filter: &Filter, most: u32) -> Result<Vec<Row>, Error> {
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

    /// Seals some records of other keys with the first one.
    ///
    /// # Errors
    /// [`Error`] for the first record that does not open; those before it are sealed anew.
    pub async fn rotate(&self) -> Result<Rotated, Error> {
        let (store, keys) = (self.store()?, self.keys()?);
        let key = keys.first();
        let (rows, before) = store.sealed_otherwise(&key.id, AT_ONCE).await?;
        let mut sealed = 0;
        for row in rows {
            let record = reseal(&row, keys).map_err(|error| Error::Rotation {
                user_id: row.user_id.clone(),
                provider: row.provider.clone(),
                source: error.into(),
            })?;
            let resealed = store.reseal(&row, &key.id, &record.encode_to_vec()).await?;
            sealed += u32::from(resealed);
        }
        let left = before.saturating_sub(sealed.into());
        Ok(Rotated { sealed, left })
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
    let provider = row.provider.parse().map_err(|_| Error::NotOpened)?;
    let binding = Binding {
        user_id: &row.user_id,
        provider,
    };
    let credential = open(row, binding, keys)?;
    Ok(Record::seal(
        &credential,
        binding,
        row.version,
        keys.first(),
    ))
}

/// Opens what stands in the store. Its version stands beside it too: a record that was put
/// back into the place of a later one does not open.
fn open(row: &Row, binding: Binding, keys: &KeyRing) -> Result<Credential, Error> {
    let record = Record {
        version: row.version,
        ..Record::read(&row.record)?
    };
    record.open(binding, keys)
}
