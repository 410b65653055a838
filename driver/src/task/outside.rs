//! What a plain task has outside of its container, at the node's broker: the key of its model,
//! and what it reaches without a network of its own.

use std::{
    io::{self, Read},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
};

use bytes::Bytes;
use polydev_proto::{
    broker::{self, Key, Keys, Open},
    driver::TaskConfig,
    sealed,
};
use polydev_transport::upstream::Unreadable;
use zeroize::Zeroizing;

use super::folders::Folders;
use crate::{
    broker::{Broker, Error as BrokerError, Opened},
    config::Task,
};

/// Longest key, as shims have it.
const MAX_KEY: usize = 4096;

/// Why a task does not get what it has at the broker.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the key in `{path}`, given in `broker.credential_file`")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error(
        "`{path}`, given in `broker.credential_file`, must have a key of 1 to {MAX_KEY} visible characters"
    )]
    NoKey { path: PathBuf },
    #[error("the node has no broker, which `broker` and `egress` need")]
    NoBroker,
    #[error(transparent)]
    Upstream(#[from] Unreadable),
    #[error("the key cannot be sealed to the broker")]
    Sealed(#[from] sealed::Error),
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// What is needed to open a container at the broker.
#[derive(Debug)]
pub(super) struct Outside {
    task_id: String,
    upstream: Option<broker::Upstream>,
    egress: Option<broker::Egress>,
    key: Option<Key>,
}

impl Outside {
    /// Reads the key. `None` if the task needs no broker.
    ///
    /// # Errors
    /// [`Error`]
    pub(super) fn make(task: &TaskConfig, options: &Task) -> Result<Option<Self>, Error> {
        if !options.is_brokered() {
            return Ok(None);
        }
        let given = options.broker.as_ref();
        let upstream = given.and_then(|given| Some(given.upstream.as_ref()?.read(given.provider)));
        let key = given.map(|given| {
            Ok::<_, Error>(Key {
                provider: given.provider.to_string(),
                value: Bytes::from_owner(read(task, &given.credential_file)?),
            })
        });
        let allow = options.egress.clone();
        Ok(Some(Self {
            task_id: task.id.clone(),
            upstream: upstream.transpose()?,
            egress: allow.map(|allow| broker::Egress { allow }),
            key: key.transpose()?,
        }))
    }

    /// Opens the container at the broker, with the key. Its requests come from `requests`.
    ///
    /// # Errors
    /// [`Error`]; the container is not open then.
    pub(super) async fn open(
        &self,
        broker: &Arc<Broker>,
        container: &str,
        bytes_per_second: u64,
        requests: OwnedFd,
    ) -> Result<Opened, Error> {
        let public_key = broker.public_key();
        if public_key.is_empty() {
            return Err(Error::NoBroker);
        }
        let keys = self.key.clone().map(|key| {
            let keys = Keys { keys: vec![key] };
            sealed::seal_keys(&public_key, &self.task_id, &keys)
        });
        let keys = keys.transpose()?.unwrap_or_default();
        let open = Open {
            container: container.to_owned(),
            bytes_per_second,
            upstreams: self.upstream.clone().into_iter().collect(),
            egress: self.egress.clone(),
            grant: None,
            rehearses: false,
        };
        let opened = broker.open(open, requests);
        if let Some(granting) = opened.grant(&*self.task_id, keys, None, bytes_per_second) {
            granting.done().await?;
        }
        Ok(opened)
    }
}

impl Error {
    /// Whether the task may start without a change of its job.
    pub(super) fn is_recoverable(&self) -> bool {
        matches!(self, Self::NoBroker | Self::Sealed(_) | Self::Broker(_))
    }
}

/// The key, without white space around it.
fn read(task: &TaskConfig, given: &str) -> Result<Zeroizing<Vec<u8>>, Error> {
    let folders = Folders::of(task);
    let path = folders.task.join(given);
    let unreadable = |source| Error::Unreadable {
        path: path.clone(),
        source,
    };
    let file = folders.private(given).map_err(unreadable)?;
    // It does not grow: what it left behind would not be wiped.
    let mut key = Zeroizing::new(Vec::with_capacity(2 * MAX_KEY));
    let read = file.take(MAX_KEY as u64 + 1).read_to_end(&mut key);
    read.map_err(unreadable)?;
    let trimmed = key.trim_ascii();
    let is_key = trimmed.iter().all(u8::is_ascii_graphic);
    if !is_key || !(1..=MAX_KEY).contains(&trimmed.len()) {
        return Err(Error::NoKey { path });
    }
    Ok(Zeroizing::new(trimmed.to_vec()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_key_is_one_word_in_a_file_that_no_container_has() {
        let folder = tempfile::tempdir().unwrap();
        let private = folder.path().join("web/private");
        fs::create_dir_all(&private).unwrap();
        let task = TaskConfig {
            name: "web".into(),
            alloc_dir: folder.path().display().to_string(),
            ..TaskConfig::default()
        };
        let read = |text: &str| {
            fs::write(private.join("key"), text).unwrap();
            read(&task, "private/key").map(|key| String::from_utf8(key.to_vec()).unwrap())
        };
        assert_eq!(read("hunter2\n").unwrap(), "hunter2");
        for wrong in ["", "\n", "two words", "two\nlines", &"x".repeat(4097)] {
            let error = read(wrong).unwrap_err().to_string();
            assert!(error.contains("`broker.credential_file`"), "{error}");
        }
        std::os::unix::fs::symlink("/etc/hostname", private.join("link")).unwrap();
        for elsewhere in ["private/link", "private/none"] {
            let error = super::read(&task, elsewhere).unwrap_err();
            assert!(matches!(error, Error::Unreadable { .. }), "{error}");
        }
    }
}
