//! Takes accounts that a provider's CLI refreshes in a run back into the store.
//!
//! The file comes sealed through a driver, and possibly to another shim than the one that sent
//! the original. The key of the file is therefore derived from a master key, which all shims have,
//! and from the label, which says what was sent. Nobody has a key for a changed label. A node can
//! change only the credentials that were sent to it, and only while a run may last.
//!
//! A run's file replaces the file that the run got, or the file that the same run sent before, and
//! no other. The n-th report of a run has the version of the original plus n, so that reports may
//! come twice, late, or to several shims.

use std::{
    convert::Infallible,
    future::pending,
    time::{Duration, SystemTime},
};

use polydev_proto::{
    id::{RunId, UserId},
    init::Refreshed,
    node::{WatchRefreshedRequest, node_service_client::NodeServiceClient},
    sealed,
};
use prost::Message;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::{Status, transport::Channel};

use super::{
    label::{Label, private_key},
    record::{Binding, Record},
    store::{Info, Row},
    vault::{self, MAX_TRIES, Vault},
};
use crate::{
    listen::{CONNECT_TIMEOUT, listen},
    provider::Cli,
    secret::Credential,
};

/// How long after the making of a run's id a file of the run is accepted. Drivers accept an id for
/// an hour; the longest run and the time for its results add about 24 hours; the rest is for clocks.
const MAX_AGE: Duration = Duration::from_secs(26 * 3600);
/// How far the clock that made an id may be ahead.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(10 * 60);
/// The largest number of reports of one run. A run reports at most every ten seconds.
const MAX_COUNT: u64 = 1 << 32;

/// Why a file is not taken back. Never quotes the file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the file's label is not of this run")]
    Label,
    #[error("the run began too long ago")]
    TooOld,
    #[error(transparent)]
    NotOpened(#[from] sealed::Error),
    #[error("the file is not an account that can be refreshed")]
    NoAccount,
    #[error("the credential was changed or deleted meanwhile")]
    Superseded,
    #[error(transparent)]
    Vault(#[from] vault::Error),
}

impl Vault {
    /// Takes back the file that a run has sent. `None` if this file was taken back before.
    ///
    /// # Errors
    /// [`Error`]. Nothing has changed then, except that a failed store may have the new version.
    pub async fn take_back(
        &self,
        run_id: RunId,
        refreshed: &Refreshed,
    ) -> Result<Option<Info>, Error> {
        let label = Label::decode(&*refreshed.label).map_err(|_| Error::Label)?;
        if label.run_id.parse() != Ok(run_id) {
            return Err(Error::Label);
        }
        check_age(run_id, SystemTime::now())?;
        let (keys, store) = (self.keys()?, self.store()?);
        let key = keys.find(&label.key_id);
        let key = key.ok_or_else(|| vault::Error::UnknownKey {
            key_id: label.key_id.clone(),
        })?;
        let file = private_key(key, &refreshed.label)
            .open_refreshed(&refreshed.sealed, &refreshed.label)?;
        // The file has opened, so a shim has made the label.
        if !(1..=MAX_COUNT).contains(&file.count) {
            return Err(Error::Label);
        }
        let version = label.version + file.count;
        let user_id = UserId::from(label.user_id.as_str());
        let binding = Binding {
            user_id: &user_id,
            provider: label.provider.parse().map_err(|_| Error::Label)?,
        };
        if !binding.provider.is_refreshable(&file.content) {
            return Err(Error::NoAccount);
        }
        let credential = Credential::OauthFile(file.content.to_vec().into());
        drop(file);
        credential.check().map_err(vault::Error::from)?;
        for _ in 0..MAX_TRIES {
            let row = store.get(binding.user_id, binding.provider);
            let row = row.await.map_err(vault::Error::from)?;
            let row = row.ok_or(Error::Superseded)?;
            match label.standing(&row.info, version) {
                Standing::Next => {}
                Standing::Known => return Ok(None),
                Standing::Superseded => return Err(Error::Superseded),
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

/// Limits how long a node that once got a key can use the key.
fn check_age(run_id: RunId, now: SystemTime) -> Result<(), Error> {
    let made = run_id.made_at();
    if made > now + MAX_CLOCK_SKEW {
        return Err(Error::Label);
    }
    match now.duration_since(made) {
        Ok(age) if age > MAX_AGE => Err(Error::TooOld),
        _ => Ok(()),
    }
}

impl Label {
    /// How a file that would get `version` relates to the credential in the store.
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

/// Takes back what the runs of one node refresh, for as long as the future is polled. A driver
/// sends all that it keeps to each new listener. The shim therefore asks again for what the store
/// did not take.
pub async fn follow(vault: &Vault, node_id: &str, channel: Channel) -> Infallible {
    if !vault.has_store() {
        return pending().await;
    }
    let once = |retry| follow_once(vault, channel.clone(), retry);
    listen(node_id, "refreshed accounts", once).await
}

/// Ends `retry` after the first file that the store did not take: the shim waits once for the store
/// and once for the driver. The store may have taken other
/// files.
async fn follow_once(
    vault: &Vault,
    channel: Channel,
    retry: Duration,
) -> Result<Infallible, Status> {
    let mut client = NodeServiceClient::new(channel);
    let told = timeout(
        CONNECT_TIMEOUT,
        client.watch_refreshed(WatchRefreshedRequest {}),
    )
    .await;
    let told = told.map_err(|_| Status::deadline_exceeded("no answer within 5 s"))?;
    let mut told = told?.into_inner();
    let mut failed: Option<(Instant, Status)> = None;
    loop {
        let message = match &failed {
            None => told.message().await,
            Some((at, status)) => match timeout_at(*at + retry, told.message()).await {
                Ok(message) => message,
                Err(_) => return Err(status.clone()),
            },
        };
        let ended = || Status::unavailable("the driver ended the stream");
        let message = message?.ok_or_else(ended)?;
        if let Some(refreshed) = message.refreshed
            && let Err(status) = take_back(vault, &message.run_id, &refreshed).await
        {
            failed.get_or_insert((Instant::now(), status));
        }
    }
}

/// # Errors
/// If the store failed.
async fn take_back(vault: &Vault, run_id: &str, refreshed: &Refreshed) -> Result<(), Status> {
    let taken = match run_id.parse() {
        Ok(run_id) => vault.take_back(run_id, refreshed).await,
        Err(_) => Err(Error::Label),
    };
    match taken {
        Ok(Some(info)) => {
            let Info {
                user_id,
                provider,
                version,
                ..
            } = info;
            tracing::info!(run_id, %user_id, provider, version, "account refreshed");
        }
        Ok(None) => {}
        Err(Error::Vault(vault::Error::Store(error))) => {
            let reason = crate::chain(&error);
            tracing::warn!(run_id, reason, "a refreshed account waits for the store");
            return Err(Status::unavailable(reason));
        }
        Err(error) => {
            let reason = crate::chain(&error);
            tracing::info!(run_id, reason, "refreshed account rejected");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::keys::tests::ring;
    use crate::credentials::label::refreshable;
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
        // The store may have missed earlier reports.
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
        let alice = UserId::from("alice");
        let binding = Binding {
            user_id: &alice,
            provider: "openai".parse().unwrap(),
        };
        let asked = refreshable(&info(3), binding, RunId::now(), keys.first());
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
    fn a_label_is_good_for_as_long_as_a_run_may_go_on() {
        let run_id = RunId::now();
        let now = SystemTime::now();
        let minute = Duration::from_secs(60);
        assert!(check_age(run_id, now + MAX_AGE - minute).is_ok());
        let later = check_age(run_id, now + MAX_AGE + minute);
        assert!(matches!(later, Err(Error::TooOld)));
        let before = check_age(run_id, now - MAX_CLOCK_SKEW - minute);
        assert!(matches!(before, Err(Error::Label)));
    }
}
