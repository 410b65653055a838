//! The credential store: sealed records in PostgreSQL, for a cluster, or SQLite, for one
//! machine, through the same statements.

mod address;

pub use address::{Address, InvalidAddress};

use std::time::{Duration, SystemTime};

use sqlx::{
    AnyPool, AssertSqlSafe, Row as _, SqlSafeStr, SqlStr,
    any::{AnyPoolOptions, AnyRow, install_default_drivers},
    migrate::{Migration, MigrationType, Migrator},
};
use tokio::{sync::OnceCell, time::timeout};

use super::record::TENANT;
use address::Kind;
use polydev_proto::{id::UserId, provider::Vendor};

/// How long the store may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_CONNECTIONS: u32 = 8;
const COLUMNS: &str = "user_id, provider, version, kind, key_id, created_at, updated_at, \
     kept_version, refreshed_by";
/// A table name of our own, because others may use the database too.
const MIGRATIONS: &str = "polydev_migrations";

/// Why the store failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the credential store did not answer within {} s", ANSWER_TIMEOUT.as_secs())]
    TimedOut,
    #[error("the tables of the credential store do not fit this version of the shim")]
    Schema(#[source] sqlx::migrate::MigrateError),
    #[error("the credential store failed")]
    Failed(#[from] sqlx::Error),
}

impl Error {
    /// Whether the error may pass. An error that the database itself reports does not.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::TimedOut => true,
            Self::Schema(_) | Self::Failed(sqlx::Error::Database(_)) => false,
            Self::Failed(_) => true,
        }
    }
}

/// What callers can see of a credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    pub user_id: UserId,
    pub provider: String,
    /// 1 or more, and higher for each replacement; see [`refreshed`](super::refreshed).
    pub version: u64,
    /// The number of the `CredentialKind`.
    pub kind: i32,
    /// The id of the master key.
    pub key_id: String,
    pub created_at: SystemTime,
    pub updated_at: SystemTime,
    /// Whether the store keeps what runs refresh of this credential.
    pub keep_refreshed: bool,
    /// The run that refreshed the credential last; empty if it is as put.
    pub refreshed_by: String,
}

/// One stored credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub info: Info,
    /// A [`Record`](super::record::Record), encoded.
    pub record: Vec<u8>,
}

/// Which rows to list, in the order of user and provider.
#[derive(Debug, Default)]
pub struct Filter {
    pub user_id: Option<UserId>,
    pub provider: Option<Vendor>,
    /// Only rows after this user and provider.
    pub after: Option<(UserId, String)>,
}

/// The table of credentials. The first query creates the table, so that a shim without its store
/// can still serve callers who do not need the store.
#[derive(Debug)]
pub struct Store {
    pool: AnyPool,
    kind: Kind,
    url: String,
    has_schema: OnceCell<()>,
}

impl Store {
    /// Makes the pool of connections. This call does not connect yet.
    ///
    /// # Errors
    /// [`Error::Failed`] if the address has options that the database does not know.
    pub fn open(address: &Address) -> Result<Self, Error> {
        install_default_drivers();
        let url = address.url();
        let pool = AnyPoolOptions::new()
            .max_connections(MAX_CONNECTIONS)
            .acquire_timeout(ANSWER_TIMEOUT)
            .connect_lazy(url.as_str())?;
        Ok(Self {
            pool,
            kind: address.kind(),
            url: url.into(),
            has_schema: OnceCell::new(),
        })
    }

    /// The credential of a user for a provider.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn get(&self, user_id: &UserId, provider: Vendor) -> Result<Option<Row>, Error> {
        let statement = format!(
            "SELECT {COLUMNS}, record FROM polydev_credentials \
             WHERE tenant = $1 AND user_id = $2 AND provider = $3"
        );
        self.answer(async |pool| {
            let query = sqlx::query(safe(statement))
                .bind(TENANT)
                .bind(user_id.as_str());
            let row = query.bind(provider.name()).fetch_optional(pool).await?;
            row.map(|row| decode_row(&row)).transpose()
        })
        .await
    }

    /// Stores a credential in place of the one with the version `replaces`. `None` means that there
    /// must not be one yet. Returns false if the store has something else.
    ///
    /// # Errors
    /// [`Error`]. If the answer came too late, the credential may be stored.
    pub async fn put(&self, row: &Row, replaces: Option<u64>) -> Result<bool, Error> {
        let info = &row.info;
        let statement = match replaces {
            None => {
                "INSERT INTO polydev_credentials (tenant, user_id, provider, version, kind, \
                 key_id, record, created_at, updated_at, kept_version, refreshed_by) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT DO NOTHING"
            }
            Some(_) => {
                "UPDATE polydev_credentials SET version = $4, kind = $5, key_id = $6, \
                 record = $7, created_at = $8, updated_at = $9, kept_version = $10, \
                 refreshed_by = $11 \
                 WHERE tenant = $1 AND user_id = $2 AND provider = $3 AND version = $12"
            }
        };
        self.answer(async |pool| {
            let query = sqlx::query(statement)
                .bind(TENANT)
                .bind(info.user_id.as_str());
            let query = query.bind(&info.provider).bind(info.version.cast_signed());
            let query = query.bind(info.kind).bind(&info.key_id).bind(&row.record);
            let query = query
                .bind(seconds(info.created_at))
                .bind(seconds(info.updated_at))
                .bind(if info.keep_refreshed { info.version } else { 0 }.cast_signed())
                .bind(&info.refreshed_by);
            let query = match replaces {
                Some(version) => query.bind(version.cast_signed()),
                None => query,
            };
            Ok(query.execute(pool).await?.rows_affected() == 1)
        })
        .await
    }

    /// Replaces the record of `was` with another record of the same version. Returns false if `was`
    /// is no longer in the store.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn reseal(&self, was: &Info, key_id: &str, record: &[u8]) -> Result<bool, Error> {
        let statement = "UPDATE polydev_credentials SET key_id = $1, record = $2 \
             WHERE tenant = $3 AND user_id = $4 AND provider = $5 AND version = $6 AND key_id = $7";
        self.answer(async |pool| {
            let query = sqlx::query(statement)
                .bind(key_id)
                .bind(record)
                .bind(TENANT);
            let query = query.bind(was.user_id.as_str()).bind(&was.provider);
            let query = query.bind(was.version.cast_signed()).bind(&was.key_id);
            Ok(query.execute(pool).await?.rows_affected() == 1)
        })
        .await
    }

    /// The first `most` rows that fit `filter`.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn list(&self, filter: &Filter, most: u32) -> Result<Vec<Info>, Error> {
        // No user or provider has an empty name, so the empty name stands for any.
        let statement = format!(
            "SELECT {COLUMNS} FROM polydev_credentials WHERE tenant = $1 \
             AND ($2 = '' OR user_id = $2) AND ($3 = '' OR provider = $3) \
             AND (user_id > $4 OR (user_id = $4 AND provider > $5)) \
             ORDER BY user_id, provider LIMIT $6"
        );
        let (user, provider) = names(filter.after.as_ref());
        self.answer(async |pool| {
            let query = sqlx::query(safe(statement)).bind(TENANT);
            let query = query.bind(filter.user_id.as_ref().map_or("", UserId::as_str));
            let query = query.bind(filter.provider.map_or("", Vendor::name));
            let query = query.bind(user).bind(provider).bind(i64::from(most));
            let rows = query.fetch_all(pool).await?;
            rows.iter().map(decode).collect()
        })
        .await
    }

    /// The first `most` rows after `after` that are sealed with another key than `key_id`, and the
    /// number of all such rows.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn sealed_otherwise(
        &self,
        key_id: &str,
        after: Option<&(UserId, String)>,
        most: u32,
    ) -> Result<(Vec<Row>, u64), Error> {
        let statement = format!(
            "SELECT {COLUMNS}, record FROM polydev_credentials \
             WHERE tenant = $1 AND key_id <> $2 \
             AND (user_id > $3 OR (user_id = $3 AND provider > $4)) \
             ORDER BY user_id, provider LIMIT $5"
        );
        let (user, provider) = names(after);
        let count = "SELECT count(*) FROM polydev_credentials WHERE tenant = $1 AND key_id <> $2";
        self.answer(async |pool| {
            let query = sqlx::query(safe(statement)).bind(TENANT).bind(key_id);
            let query = query.bind(user).bind(provider).bind(i64::from(most));
            let rows = query.fetch_all(pool).await?;
            let count = sqlx::query(count).bind(TENANT).bind(key_id);
            let count: i64 = count.fetch_one(pool).await?.try_get(0)?;
            let rows: Result<_, _> = rows.iter().map(decode_row).collect();
            Ok((rows?, count.cast_unsigned()))
        })
        .await
    }

    /// Removes a credential. Returns false if there was none.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn delete(&self, user_id: &UserId, provider: Vendor) -> Result<bool, Error> {
        let statement = "DELETE FROM polydev_credentials \
             WHERE tenant = $1 AND user_id = $2 AND provider = $3";
        self.answer(async |pool| {
            let query = sqlx::query(statement).bind(TENANT).bind(user_id.as_str());
            let deleted = query.bind(provider.name()).execute(pool).await?;
            Ok(deleted.rows_affected() == 1)
        })
        .await
    }

    /// Creates the tables if needed, then asks the database.
    async fn answer<T>(
        &self,
        ask: impl AsyncFnOnce(&AnyPool) -> Result<T, sqlx::Error>,
    ) -> Result<T, Error> {
        let answer = async {
            self.has_schema.get_or_try_init(|| self.migrate()).await?;
            Ok(ask(&self.pool).await?)
        };
        timeout(ANSWER_TIMEOUT, answer)
            .await
            .map_err(|_| Error::TimedOut)?
    }

    async fn migrate(&self) -> Result<(), Error> {
        let first = match self.kind {
            Kind::Postgres => include_str!("schema/postgres.sql"),
            Kind::Sqlite => include_str!("schema/sqlite.sql"),
        };
        let refreshed = include_str!("schema/refreshed.sql");
        let migration = |version, name: &'static str, statements: &'static str| {
            let (kind, statements) = (MigrationType::Simple, statements.into_sql_str());
            Migration::new(version, name.into(), kind, statements, false)
        };
        let mut migrator = Migrator::with_migrations(vec![
            migration(1, "credentials", first),
            migration(2, "refreshed", refreshed),
        ]);
        migrator.dangerous_set_table_name(MIGRATIONS);
        // A failed migration leaves its lock on the connection. The migration therefore has a
        // connection of its own.
        let pool = AnyPoolOptions::new().max_connections(1);
        let pool = pool
            .acquire_timeout(ANSWER_TIMEOUT)
            .connect_lazy(&self.url)?;
        let migrated = migrator.run(&pool).await;
        pool.close().await;
        migrated.map_err(|error| match error {
            sqlx::migrate::MigrateError::Execute(error) => Error::Failed(error),
            error => Error::Schema(error),
        })
    }
}

/// Marks a statement as safe, because it consists only of constants.
fn safe(statement: String) -> SqlStr {
    AssertSqlSafe(statement).into_sql_str()
}

/// Without `after`, empty names, which sort before all others.
fn names(after: Option<&(UserId, String)>) -> (&str, &str) {
    after.map_or(("", ""), |(user, provider)| (user.as_str(), provider))
}

fn decode_row(row: &AnyRow) -> Result<Row, sqlx::Error> {
    Ok(Row {
        info: decode(row)?,
        record: row.try_get(9)?,
    })
}

fn decode(row: &AnyRow) -> Result<Info, sqlx::Error> {
    let time = |seconds: i64| {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.try_into().unwrap_or_default())
    };
    let version = row.try_get::<i64, _>(2)?;
    let keep_refreshed = row.try_get::<i64, _>(7)? == version;
    let refreshed_by: String = row.try_get(8)?;
    Ok(Info {
        user_id: row.try_get::<String, _>(0)?.into(),
        provider: row.try_get(1)?,
        version: version.cast_unsigned(),
        kind: row.try_get(3)?,
        key_id: row.try_get(4)?,
        created_at: time(row.try_get(5)?),
        updated_at: time(row.try_get(6)?),
        keep_refreshed,
        refreshed_by: Some(refreshed_by)
            .filter(|_| keep_refreshed)
            .unwrap_or_default(),
    })
}

fn seconds(time: SystemTime) -> i64 {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    since.as_secs().cast_signed()
}
