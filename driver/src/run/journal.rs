//! What the driver must know about runs after a restart: an append-only log. The driver
//! writes a record before the step that it announces, and syncs it within
//! `SYNC_INTERVAL`. So a crash of the driver loses no record. A crash of the machine is
//! recognised by the boot id in claims.
//!
//! Each line is one record, `CHECKSUM JSON`; the first line holds the format and its
//! version. The log contains nothing secret: only a hash of the command, and no output.

mod rewrite;

pub use rewrite::{Rewrite, Rewritten};

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, ErrorKind},
    ops::Not,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use polydev_proto::{
    execution::Permit,
    id::{Generation, RunId, SlotId, UserId},
    node::ended::Reason,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::{sync::Notify, time::sleep};

use super::{Ballot, Ended, cancel::Cause};
use crate::{headroom::Amount, life::Holder};

const VERSION: u32 = 1;
/// The log is rewritten when it exceeds this length and several times the size of the
/// records still needed.
const MAX_LENGTH: u64 = 1 << 20;
const SYNC_INTERVAL: Duration = Duration::from_millis(10);

/// One step of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case", deny_unknown_fields)]
pub enum Record {
    /// The first line.
    Format {
        version: u32,
        /// Earlier events are in no journal.
        begun: SystemTime,
    },
    /// A slot's container is reserved for the run. Nothing has started.
    Claimed(Box<Claimed>),
    /// The command's process exists.
    Started { run_id: RunId, after: Duration },
    /// The run was asked to end, perhaps with a reason.
    Cancelled {
        run_id: RunId,
        #[serde(default)]
        reason: String,
        /// An API did not take its key. Omitted if not, so that older drivers can read the
        /// record.
        #[serde(default, skip_serializing_if = "Not::not")]
        credential_refused: bool,
        /// An API was overloaded for too long. Omitted if not, too.
        #[serde(default, skip_serializing_if = "Not::not")]
        api_unavailable: bool,
        /// The user's budget is used up. Omitted if not, too.
        #[serde(default, skip_serializing_if = "Not::not")]
        budget_exhausted: bool,
    },
    /// The run is over, with this result.
    Exited { run_id: RunId, ended: Ended },
    /// The claim failed before the start: no instruction of the command ran.
    Aborted { run_id: RunId },
    /// The run's output and result are no longer available; this record replaces its
    /// others.
    Released {
        run_id: RunId,
        /// Omitted by older drivers.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user_id: Option<UserId>,
        spec_hash: String,
        slot_id: SlotId,
        generation: Generation,
        claimed_at: SystemTime,
    },
    /// Only claims above this ballot that have its nonce are accepted.
    Fenced {
        run_id: RunId,
        /// Whose run it is. Omitted by older drivers, and if an older shim has asked.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user_id: Option<UserId>,
        ballot: Ballot,
        at: SystemTime,
        /// A claim of the run failed before its start.
        #[serde(default)]
        aborted: bool,
        /// Newer nodes that tries claim on. Omitted if empty, so that older drivers can
        /// read the record.
        #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
        claims_on: BTreeSet<String>,
    },
}

/// A run at its claim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claimed {
    pub run_id: RunId,
    pub user_id: UserId,
    /// Who has asked for it, by the name that roles know: for rules about its tools. Omitted in a pool
    /// that does not ask about them, so that older drivers can read the record.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub caller: String,
    /// The user that the caller is, if that is known. Omitted too.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub caller_user: String,
    pub ballot: Ballot,
    /// Empty if an older driver wrote the record.
    #[serde(default)]
    pub provider: String,
    pub slot_id: SlotId,
    pub generation: Generation,
    /// Hash of everything that is executed, in hexadecimal; see
    /// [`super::claim::spec_hash`].
    pub spec_hash: String,
    /// The execution token that the claim has used up. Omitted without one, so that older drivers
    /// can read the record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Permit>,
    pub claimed_at: SystemTime,
    /// The same moment on the kernel's clock since boot, which cannot be set.
    pub uptime: Duration,
    pub timeout: Duration,
    pub kill_timeout: Duration,
    /// How long an API may be overloaded. Omitted without a limit, so that older drivers can
    /// read the record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_api_wait: Option<Duration>,
    /// Whether it goes on if an API does not take its key. Omitted if not, too.
    #[serde(default, skip_serializing_if = "Not::not")]
    pub keeps_on: bool,
    pub drop_oldest: bool,
    /// How much of its input is files; the command starts only once they are complete.
    #[serde(default)]
    pub files_bytes: u64,
    /// Whether its slot serves only this run.
    #[serde(default)]
    pub on_demand: bool,
    /// Its share of the node's headroom.
    pub share: Amount,
    /// The kernel's boot id when the container started.
    pub boot_id: String,
    pub container: String,
    /// Process 1 of the container, and its start time according to the kernel, because the
    /// pid alone may belong to another process by now.
    pub pid: u32,
    pub pid_start: u64,
    /// Folder of init's socket.
    pub link: PathBuf,
}

impl Claimed {
    /// What has the slot.
    #[must_use]
    pub fn holder(&self) -> Holder {
        Holder {
            run_id: self.run_id,
            user_id: self.user_id.clone(),
        }
    }
}

impl Record {
    pub(super) fn cancelled(run_id: RunId, cause: &Cause) -> Self {
        let (Cause::Asked(reason)
        | Cause::CredentialRefused(reason)
        | Cause::ApiUnavailable(reason)
        | Cause::BudgetExhausted(reason)) = cause;
        Self::Cancelled {
            run_id,
            reason: reason.clone(),
            credential_refused: matches!(cause, Cause::CredentialRefused(_)),
            api_unavailable: matches!(cause, Cause::ApiUnavailable(_)),
            budget_exhausted: matches!(cause, Cause::BudgetExhausted(_)),
        }
    }

    /// The run that the record is about; `None` for the format.
    #[must_use]
    pub fn run_id(&self) -> Option<RunId> {
        match self {
            Self::Format { .. } => None,
            Self::Claimed(claimed) => Some(claimed.run_id),
            Self::Started { run_id, .. }
            | Self::Cancelled { run_id, .. }
            | Self::Exited { run_id, .. }
            | Self::Aborted { run_id }
            | Self::Released { run_id, .. }
            | Self::Fenced { run_id, .. } => Some(*run_id),
        }
    }
}

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot use the journal `{path}`")]
    File { path: PathBuf, source: io::Error },
    #[error(
        "cannot read the journal `{path}` from byte {offset} on: {problem}; the file is unchanged; move it away to start without its runs"
    )]
    Broken {
        path: PathBuf,
        offset: usize,
        problem: String,
    },
    #[error(
        "the journal `{path}` has version {version}, this driver reads {VERSION}; the file is unchanged; start the driver that wrote it, or move it away"
    )]
    Version { path: PathBuf, version: u64 },
}

/// The decoded records, and how many bytes they took.
#[derive(Debug)]
pub struct Decoded {
    pub records: Vec<Record>,
    /// When the journal was started; `None` if it is empty.
    pub begun: Option<SystemTime>,
    /// Bytes of complete records; the rest is an incomplete last write.
    pub whole: usize,
}

/// Decodes a journal.
///
/// # Errors
/// [`Error`] for any damage except an incomplete end.
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
            // A crash of the machine may leave the last write incomplete.
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
                    problem: "a second format record".into(),
                });
            }
            _ if whole == 0 => {
                return Err(Error::Broken {
                    path: path.to_owned(),
                    offset: 0,
                    problem: "the first record is not its format".into(),
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

/// The version in a first line, if it is not this driver's version.
fn other_version(json: &[u8]) -> Option<u64> {
    let format: serde_json::Value = serde_json::from_slice(json).ok()?;
    let version = format.get("version")?.as_u64()?;
    (format["record"] == "format" && version != u64::from(VERSION)).then_some(version)
}

/// Whether the bytes may be a first write that a crash of the machine interrupted.
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

/// Letters in a checksum.
const CHECKSUM: usize = 8;

fn checksum(json: &[u8]) -> String {
    hex::encode(&Sha256::digest(json)[..CHECKSUM / 2])
}

/// Encodes one line.
///
/// # Panics
/// If a time in the record is before 1970.
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
    /// What was written since a [`Rewrite`] was begun.
    since: Option<Vec<u8>>,
    /// Notified when there is something to sync.
    dirty: Arc<Notify>,
}

impl Journal {
    /// Opens or creates the journal of a state folder, and reads its records.
    ///
    /// # Errors
    /// [`Error`]; the file is unchanged.
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
        // An interrupted first write can leave only the beginning of a format record.
        if whole == 0 && !is_torn_beginning(&bytes) {
            let problem = "the first record is not its format".into();
            return Err(Error::Broken {
                path,
                offset: 0,
                problem,
            });
        }
        if whole < bytes.len() {
            let lost = bytes.len() - whole;
            tracing::warn!(path = %path.display(), offset = whole, bytes = lost, "cutting off an incomplete record at the end of the journal");
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
            since: None,
            dirty: Arc::default(),
        };
        if whole == 0 {
            journal.write(&journal.format())?;
        }
        Ok((journal, records))
    }

    /// When the journal was started; it knows nothing from before.
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

    /// Appends a record. Once this returns, the record survives the driver.
    ///
    /// # Errors
    /// [`Error::File`], for example on a full disk; the record is then not in the journal.
    pub fn write(&mut self, record: &Record) -> Result<(), Error> {
        let line = encode(record);
        if let Err(source) = self.file.write_all_at(&line, self.length) {
            // A partial record would be damage in the middle after the next write.
            let _same_file = self.file.set_len(self.length);
            return Err(Error::File {
                path: self.path.clone(),
                source,
            });
        }
        self.length += line.len() as u64;
        if let Some(since) = &mut self.since {
            since.extend(line);
        }
        self.dirty.notify_one();
        Ok(())
    }

    /// Whether most of the journal is obsolete, given that `wanted` records are needed.
    #[must_use]
    pub fn is_long(&self, wanted: usize) -> bool {
        /// Approximate length of one record, with related ones.
        const RECORD: u64 = 1 << 10;
        self.length > MAX_LENGTH && self.length > 4 * RECORD * wanted as u64
    }

    /// The file to sync.
    #[must_use]
    pub fn file(&self) -> Arc<File> {
        self.file.clone()
    }

    /// Notified when there is something to sync.
    #[must_use]
    pub fn dirty(&self) -> Arc<Notify> {
        self.dirty.clone()
    }
}

/// Syncs writes to disk, forever. `file` returns the current file.
pub async fn sync(dirty: Arc<Notify>, file: impl Fn() -> Arc<File>) {
    loop {
        dirty.notified().await;
        sleep(SYNC_INTERVAL).await;
        let file = file();
        let synced = tokio::task::spawn_blocking(move || file.sync_data()).await;
        if let Ok(Err(error)) = synced {
            tracing::error!(%error, "cannot sync the journal of runs");
        }
    }
}

/// Serializes a reason under its name in the protocol, which people can read.
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
            .ok_or_else(|| D::Error::custom(format!("unknown reason `{name}`")))
    }
}

#[cfg(test)]
pub(super) mod tests;
