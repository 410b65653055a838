//! What a plain task has outside of its container, at the node's broker: the key of its model,
//! and what it reaches without a network of its own.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::PathBuf,
};

use polydev_proto::{
    broker::{self, Key, Keys, Open},
    driver::TaskConfig,
    sealed,
};
use polydev_transport::upstream::Unreadable;
use zeroize::Zeroizing;

use super::mounts::Folders;
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
    #[error("the node has no broker for `broker` or `egress`")]
    NoBroker,
    #[error(transparent)]
    Upstream(#[from] Unreadable),
    #[error("the key cannot be sealed to the broker")]
    Sealed(#[from] sealed::Error),
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// Opens a container at the broker, with its key. Its requests come from `requests`.
///
/// # Errors
/// [`Error`]; the container is not open then.
pub(super) async fn open(
    broker: &std::sync::Arc<Broker>,
    task: &TaskConfig,
    options: &Task,
    container: &str,
    bytes_per_second: u64,
    requests: OwnedFd,
) -> Result<Opened, Error> {
    let egress = options.egress.clone();
    let given = options.broker.as_ref();
    let upstream = given.and_then(|given| Some(given.upstream.as_ref()?.read(given.provider)));
    let opened = broker.open(
        Open {
            container: container.to_owned(),
            bytes_per_second,
            upstreams: upstream.transpose()?.into_iter().collect(),
            egress: egress.map(|allow| broker::Egress { allow }),
            ..Open::default()
        },
        requests,
    );
    let keys = match given {
        None => bytes::Bytes::new(),
        Some(given) => {
            let key = read(task, &given.credential_file)?;
            let key = Key {
                provider: given.provider.to_string(),
                value: bytes::Bytes::from_owner(key),
            };
            let public_key = broker.public_key();
            if public_key.is_empty() {
                return Err(Error::NoBroker);
            }
            sealed::seal_keys(&public_key, &task.id, &Keys { keys: vec![key] })?
        }
    };
    if let Some(granting) = opened.grant(task.id.clone(), keys, None, bytes_per_second) {
        granting.done().await?;
    }
    Ok(opened)
}

/// The key, without white space around it.
fn read(task: &TaskConfig, given: &str) -> Result<Zeroizing<Vec<u8>>, Error> {
    let path = Folders::of(task).task.join(given);
    let unreadable = |source| Error::Unreadable {
        path: path.clone(),
        source,
    };
    let held = Folders::of(task).secret(given);
    let held = held.ok_or_else(|| unreadable(io::ErrorKind::NotFound.into()))?;
    // It does not grow: what it left behind would not be wiped.
    let mut key = Zeroizing::new(Vec::with_capacity(2 * MAX_KEY));
    let file = File::open(held).map_err(unreadable)?;
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
    fn a_key_is_one_line_of_a_file_in_the_tasks_secrets() {
        let folder = tempfile::tempdir().unwrap();
        let secrets = folder.path().join("web/secrets");
        fs::create_dir_all(&secrets).unwrap();
        let task = TaskConfig {
            name: "web".into(),
            alloc_dir: folder.path().display().to_string(),
            ..TaskConfig::default()
        };
        let read = |text: &str| {
            fs::write(secrets.join("key"), text).unwrap();
            read(&task, "secrets/key").map(|key| String::from_utf8(key.to_vec()).unwrap())
        };
        assert_eq!(read("hunter2\n").unwrap(), "hunter2");
        for wrong in ["", "\n", "two words", "two\nlines", &"x".repeat(4097)] {
            let error = read(wrong).unwrap_err().to_string();
            assert!(error.contains("`broker.credential_file`"), "{error}");
        }
        std::os::unix::fs::symlink("/etc/hostname", secrets.join("link")).unwrap();
        for elsewhere in ["secrets/link", "secrets/none"] {
            let error = super::read(&task, elsewhere).unwrap_err();
            assert!(matches!(error, Error::Unreadable { .. }), "{error}");
        }
    }
}
