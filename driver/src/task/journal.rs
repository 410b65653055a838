//! What the driver must know about plain tasks after a restart: one file per task, written
//! before init is sent the command, and read before Nomad can ask. With `init = false` the
//! command already runs when the file is written.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{Exit, plan::OutputPath};
use crate::{
    identity::Identity,
    state::{
        files,
        records::{Found, Records},
    },
};

/// A task's journal entry.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Entry {
    pub identity: Identity,
    pub image: String,
    pub container: String,
    /// Process 1 of the container by its pid on the host, and its start time according to
    /// the kernel, because the pid alone may belong to another process by now.
    pub pid: u32,
    pub pid_start: u64,
    pub started: SystemTime,
    /// Folder of init's socket; `None` without init.
    pub link: Option<PathBuf>,
    /// The rate of what passes the broker, in bytes per second; `None` if nothing does.
    #[serde(default)]
    pub broker_rate: Option<u64>,
    pub output: OutputPath,
    pub stdout: PathBuf,
    pub stderr: PathBuf,
    /// The signal that asks the task to stop if the job names none.
    pub stop_signal: String,
    pub address: Option<IpAddr>,
    /// Whether services use this address by default.
    #[serde(default)]
    pub auto_advertise: bool,
    pub ports: Vec<(String, i32)>,
    /// The task of the group whose network it shares.
    #[serde(default)]
    pub network_of: Option<String>,
    /// Whether the plugin, and not the job, keeps its programs from becoming other users.
    #[serde(default)]
    pub no_new_privileges: bool,
    /// How the task ended, if it has.
    pub exit: Option<Exit>,
    /// When an earlier life of the driver last marked the entry.
    #[serde(skip)]
    pub marked: Option<SystemTime>,
}

/// The entries, and the files of their tasks.
#[derive(Debug)]
pub struct Journal(Records<Entry>);

impl Journal {
    /// # Errors
    /// [`files::Error`] if the folder cannot be made.
    pub fn open(state_dir: &Path) -> Result<Self, files::Error> {
        Records::open(state_dir.join("tasks")).map(Self)
    }

    /// All readable entries.
    #[must_use]
    pub fn read(&self) -> Vec<Entry> {
        let found = self.0.read().into_iter();
        let entries = found.map(|Found { record, marked }| Entry { marked, ..record });
        entries.collect()
    }

    /// # Errors
    /// [`files::Error::Write`]
    pub fn write(&self, entry: &Entry) -> Result<(), files::Error> {
        self.0.write(&entry.identity.container_name(), entry)
    }

    /// Records that the task's output has been read up to now.
    pub fn mark(&self, identity: &Identity) {
        if let Err(error) = self.0.mark(&identity.container_name()) {
            tracing::debug!(%error, "cannot mark output as read; it may be read twice");
        }
    }

    /// The folder for files that are mounted into a task's container; removed with its entry.
    #[must_use]
    pub fn files(&self, identity: &Identity) -> PathBuf {
        self.0
            .folder()
            .join(format!("{}.files", identity.container_name()))
    }

    /// Removes a task's entry; a missing entry is not an error.
    pub fn remove(&self, identity: &Identity) {
        let _there_are_none = fs::remove_dir_all(self.files(identity));
        self.0.remove(&identity.container_name());
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn entry(name: &str) -> Entry {
        Entry {
            identity: Identity {
                task_id: format!("0b1c2d3e-0000-1111-2222-333344445555/{name}/01234567"),
                task_name: name.into(),
                alloc_id: "0b1c2d3e-0000-1111-2222-333344445555".into(),
                ..Default::default()
            },
            image: "busybox:1".into(),
            container: "c0ffee".into(),
            pid: 1,
            pid_start: 2,
            started: SystemTime::UNIX_EPOCH,
            link: None,
            broker_rate: None,
            output: OutputPath::Init,
            stdout: "/dev/null".into(),
            stderr: "/dev/null".into(),
            stop_signal: "SIGTERM".into(),
            address: Some([10, 0, 0, 1].into()),
            auto_advertise: false,
            ports: vec![("http".into(), 8080)],
            network_of: None,
            no_new_privileges: false,
            exit: None,
            marked: None,
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(proptest::arbitrary::any::<u8>(), 0..300)) {
            let _refused = serde_json::from_slice::<Entry>(&bytes).is_err();
        }
    }

    #[test]
    fn names_with_dots_do_not_collide() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path()).unwrap();
        journal.write(&entry("web.v1")).unwrap();
        journal.write(&entry("web.v2")).unwrap();
        assert_eq!(journal.read().len(), 2);
    }

    #[test]
    fn what_is_written_is_read_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path()).unwrap();
        let (one, mut two) = (entry("one"), entry("two"));
        journal.write(&one).unwrap();
        journal.write(&two).unwrap();
        two.exit = Some(Exit {
            code: 3,
            ..Default::default()
        });
        journal.write(&two).unwrap();
        fs::write(folder.path().join("tasks/broken.json"), "{").unwrap();
        fs::write(folder.path().join("tasks/half.partial"), "{").unwrap();

        let journal = Journal::open(folder.path()).unwrap();
        let mut read = journal.read();
        read.sort_by_key(|entry| entry.identity.task_name.clone());
        assert_eq!(read.len(), 2);
        assert_eq!(read[0].identity, one.identity);
        assert_eq!(read[1].exit.as_ref().unwrap().code, 3);
        journal.remove(&two.identity);
        journal.remove(&two.identity);
        assert_eq!(journal.read().len(), 1);
    }
}
