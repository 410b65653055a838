//! What the driver must know of runs after its own death: a log that is only appended to.
//! A record is written before the step that it announces, and synced within
//! [`SYNC`]: a crash of the driver loses none, and one of the machine is told apart by the
//! boot id that claims carry.
//!
//! One record a line, `CHECKSUM JSON`; the first line is the format and its version.
//! Nothing in it is secret: of the command it has a hash, and no output.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use polydev_proto::node::ended::Reason;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::{sync::Notify, time::sleep};

use super::{Ballot, Ended};
use crate::headroom::Amount;

const VERSION: u32 = 1;
/// The log is written anew when it is so long, and several times what is still wanted.
const MAX_LENGTH: u64 = 1 << 20;
const SYNC_INTERVAL: Duration = Duration::from_millis(10);

/// One step of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case", deny_unknown_fields)]
pub enum Record {
    /// The first line.
    Format {
        version: u32,
        /// What came before is in no journal.
        begun: SystemTime,
    },
    /// A slot's container is the run's. Nothing has been started.
    Claimed(Box<Claimed>),
    /// The command's process exists.
    Started { run_id: String, after: Duration },
    /// Somebody asked it to end, and may have said why.
    Cancelled {
        run_id: String,
        #[serde(default)]
        reason: String,
    },
    /// It is over, with this result.
    Exited { run_id: String, ended: Ended },
    /// The claim came to nothing: no instruction of the command ran.
    Aborted { run_id: String },
    /// What it printed and how it ended cannot be asked for any more: all that is left of
    /// its other records.
    Released {
        run_id: String,
        spec_hash: String,
        slot_id: String,
        generation: u64,
        claimed_at: SystemTime,
    },
    /// Claims of the run are refused but those above this ballot and with its nonce.
    Fenced {
        run_id: String,
        ballot: Ballot,
        at: SystemTime,
        /// A claim of it came to nothing.
        #[serde(default)]
        aborted: bool,
        /// Newer nodes that tries go to; not written if there are none, so that a driver of
        /// before reads it.
        #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
        claims_on: BTreeSet<String>,
    },
}

/// A run as it was claimed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claimed {
    pub run_id: String,
    pub user_id: String,
    pub ballot: Ballot,
    /// Empty in the journal of a driver that did not note it.
    #[serde(default)]
    pub provider: String,
    pub slot_id: String,
    pub generation: u64,
    /// Of all that is executed, in hexadecimal; see [`super::claim::spec_hash`].
    pub spec_hash: String,
    pub claimed_at: SystemTime,
    /// The same moment by the kernel's clock since boot, which nobody sets.
    pub uptime: Duration,
    pub timeout: Duration,
    pub kill_timeout: Duration,
    pub drop_oldest: bool,
    /// How much of its input is files, without which the command does not start.
    #[serde(default)]
    pub files_bytes: u64,
    /// Whether its slot is for no other run.
    #[serde(default)]
    pub on_demand: bool,
    /// What it takes of the node's headroom.
    pub share: Amount,
    /// The kernel's, in whose life the container was started.
    pub boot_id: String,
    pub container: String,
    /// Process 1 of the container, and when the kernel says that it began: a pid alone may
    /// be another's by now.
    pub pid: u32,
    pub pid_start: u64,
    /// Folder of init's socket.
    pub link: PathBuf,
}

impl Record {
    /// The run that it is about.
    #[must_use]
    pub fn run_id(&self) -> &str {
        match self {
            Self::Format { .. } => "",
            Self::Claimed(claimed) => &claimed.run_id,
            Self::Started { run_id, .. }
            | Self::Cancelled { run_id, .. }
            | Self::Exited { run_id, .. }
            | Self::Aborted { run_id }
            | Self::Released { run_id, .. }
            | Self::Fenced { run_id, .. } => run_id,
        }
    }
}

/// Why there is no journal to go on with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot use the journal `{path}`")]
    File { path: PathBuf, source: io::Error },
    #[error(
        "the journal `{path}` cannot be read from byte {offset} on: {problem}; it is left as it is: move it away to start without the runs in it"
    )]
    Broken {
        path: PathBuf,
        offset: usize,
        problem: String,
    },
    #[error(
        "the journal `{path}` has version {version}, this driver reads {VERSION}; it is left as it is: start the driver that wrote it, or move it away"
    )]
    Version { path: PathBuf, version: u64 },
}

/// What was read, and how much of the bytes it took.
#[derive(Debug)]
pub struct Decoded {
    pub records: Vec<Record>,
    /// When the journal was begun; `None` for an empty one.
    pub begun: Option<SystemTime>,
    /// Bytes of whole records; what follows is the torn end of a last write.
    pub whole: usize,
}

/// Reads a journal's bytes.
///
/// # Errors
/// [`Error`] for anything but a torn end.
pub fn decode(path: &Path, bytes: &[u8]) -> Result<Decoded, Error> {
    let mut records = Vec::new();
    let (mut whole, mut begun) = (0, None);
    while let Some(length) = bytes[whole..].iter().position(|byte| *byte == b'\n') {
        let line = &bytes[whole..whole + length];
        let next = whole + length + 1;
        let json = checked(line);
        if whole == 0
            && let Some(version) = json.and_then(other_version)
        {
            return Err(Error::Version {
                path: path.to_owned(),
                version,
            });
        }
        let record = match json.map(serde_json::from_slice::<Record>) {
            Some(Ok(record)) => record,
            // A crash of the machine may leave the last write in part.
            None if next == bytes.len() && whole > 0 => break,
            damaged => {
                let problem = match damaged {
                    Some(Err(error)) => error.to_string(),
                    _ => "its checksum is wrong".into(),
                };
                return Err(Error::Broken {
                    path: path.to_owned(),
                    offset: whole,
                    problem,
                });
            }
        };
        match record {
            Record::Format { begun: at, .. } if whole == 0 => begun = Some(at),
            Record::Format { .. } => {
                return Err(Error::Broken {
                    path: path.to_owned(),
                    offset: whole,
                    problem: "a second beginning".into(),
                });
            }
            _ if whole == 0 => {
                return Err(Error::Broken {
                    path: path.to_owned(),
                    offset: 0,
                    problem: "it does not begin with its format".into(),
                });
            }
            record => records.push(record),
        }
        whole = next;
    }
    Ok(Decoded {
        records,
        begun,
        whole,
    })
}

/// The version of a first line that is not ours to understand.
fn other_version(json: &[u8]) -> Option<u64> {
    let format: serde_json::Value = serde_json::from_slice(json).ok()?;
    let version = format.get("version")?.as_u64()?;
    (format["record"] == "format" && version != u64::from(VERSION)).then_some(version)
}

/// What a first write may have left that a crash of the machine cut short.
fn is_torn_beginning(bytes: &[u8]) -> bool {
    let known = format!("{{\"record\":\"format\",\"version\":{VERSION},");
    let (sum, json) = bytes.split_at(bytes.len().min(CHECKSUM + 1));
    sum.iter()
        .all(|byte| byte.is_ascii_hexdigit() || *byte == b' ')
        && !json.contains(&b'\n')
        && (known.as_bytes().starts_with(json) || json.starts_with(known.as_bytes()))
}

fn checked(line: &[u8]) -> Option<&[u8]> {
    let (sum, json) = line.split_at_checked(CHECKSUM)?;
    let json = json.strip_prefix(b" ")?;
    (sum == checksum(json).as_bytes()).then_some(json)
}

/// Letters of a checksum.
const CHECKSUM: usize = 8;

fn checksum(json: &[u8]) -> String {
    hex::encode(&Sha256::digest(json)[..CHECKSUM / 2])
}

/// One line.
///
/// # Panics
/// If a time in it is before 1970.
#[must_use]
pub fn encode(record: &Record) -> Vec<u8> {
    let json = serde_json::to_vec(record).expect("a record can be written as JSON");
    let mut line = checksum(&json).into_bytes();
    line.push(b' ');
    line.extend(json);
    line.push(b'\n');
    line
}

/// The open log.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    begun: SystemTime,
    file: Arc<File>,
    length: u64,
    /// Told when there is something to sync.
    dirty: Arc<Notify>,
}

impl Journal {
    /// Opens the journal of a state folder, or begins one, and reads what is in it.
    ///
    /// # Errors
    /// [`Error`]; the file is as it was.
    pub fn open(state_dir: &Path) -> Result<(Self, Vec<Record>), Error> {
        let path = state_dir.join("runs.journal");
        let wrong = |source| Error::File {
            path: path.clone(),
            source,
        };
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            read => read.map_err(wrong)?,
        };
        let Decoded {
            records,
            begun,
            whole,
        } = decode(&path, &bytes)?;
        // All that a first write that was torn can have left.
        if whole == 0 && !is_torn_beginning(&bytes) {
            let problem = "it does not begin with its format".into();
            return Err(Error::Broken {
                path,
                offset: 0,
                problem,
            });
        }
        if whole < bytes.len() {
            let lost = bytes.len() - whole;
            tracing::warn!(path = %path.display(), offset = whole, bytes = lost, "the journal's torn end is cut off");
        }
        let mut options = File::options();
        options.read(true).write(true).create(true).mode(0o600);
        let file = options.truncate(false).open(&path).map_err(wrong)?;
        file.set_len(whole as u64).map_err(wrong)?;
        let mut journal = Self {
            path,
            begun: begun.unwrap_or_else(SystemTime::now),
            file: file.into(),
            length: whole as u64,
            dirty: Arc::default(),
        };
        if whole == 0 {
            journal.write(&journal.format())?;
        }
        Ok((journal, records))
    }

    /// When it was begun: of what came before it knows nothing.
    #[must_use]
    pub fn begun(&self) -> SystemTime {
        self.begun
    }

    fn format(&self) -> Record {
        Record::Format {
            version: VERSION,
            begun: self.begun,
        }
    }

    /// Adds a record; when this returns, the driver may die.
    ///
    /// # Errors
    /// [`Error::File`], for instance on a full disk: the record is not in it then.
    pub fn write(&mut self, record: &Record) -> Result<(), Error> {
        let line = encode(record);
        if let Err(source) = self.file.write_all_at(&line, self.length) {
            // A part of it would be a torn end, in the middle once more is written.
            let _same_file = self.file.set_len(self.length);
            return Err(Error::File {
                path: self.path.clone(),
                source,
            });
        }
        self.length += line.len() as u64;
        self.dirty.notify_one();
        Ok(())
    }

    /// Whether most of it is of no more use, when `wanted` records are.
    #[must_use]
    pub fn is_long(&self, wanted: usize) -> bool {
        /// About what one record takes, with its kin.
        const RECORD: u64 = 1 << 10;
        self.length > MAX_LENGTH && self.length > 4 * RECORD * wanted as u64
    }

    /// Writes the log anew with `records` alone. Syncs, which takes a while.
    ///
    /// # Errors
    /// [`Error::File`]; the log is as it was.
    pub fn rewrite<'a>(
        &mut self,
        records: impl IntoIterator<Item = &'a Record>,
    ) -> Result<(), Error> {
        let partial = self.path.with_extension("partial");
        let write = || {
            let mut bytes = encode(&self.format());
            records
                .into_iter()
                .for_each(|record| bytes.extend(encode(record)));
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(true);
            let file = options.mode(0o600).open(&partial)?;
            file.write_all_at(&bytes, 0)?;
            file.sync_all()?;
            fs::rename(&partial, &self.path)?;
            Ok((file, bytes.len() as u64))
        };
        let (file, length) = write().map_err(|source| Error::File {
            path: self.path.clone(),
            source,
        })?;
        self.file = file.into();
        self.length = length;
        Ok(())
    }

    /// What is to be synced.
    #[must_use]
    pub fn file(&self) -> Arc<File> {
        self.file.clone()
    }

    /// Told when there is something to sync.
    #[must_use]
    pub fn dirty(&self) -> Arc<Notify> {
        self.dirty.clone()
    }
}

/// Takes what has been written to the disk, again and again. `file` gives the present one.
pub async fn sync(dirty: Arc<Notify>, file: impl Fn() -> Arc<File>) {
    loop {
        dirty.notified().await;
        sleep(SYNC_INTERVAL).await;
        let file = file();
        let synced = tokio::task::spawn_blocking(move || file.sync_data()).await;
        if let Ok(Err(error)) = synced {
            tracing::error!(%error, "the journal of runs cannot be synced");
        }
    }
}

/// A reason by its name in the protocol, which people read.
pub(super) mod reason {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use super::Reason;

    pub(in crate::run) fn serialize<S: Serializer>(
        reason: &Reason,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(reason.as_str_name())
    }

    pub(in crate::run) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Reason, D::Error> {
        let name = String::deserialize(deserializer)?;
        Reason::from_str_name(&name)
            .ok_or_else(|| D::Error::custom(format!("no reason is called `{name}`")))
    }
}

#[cfg(test)]
pub(super) mod tests;
