//! The file of an account that has signed in, which the command may refresh: then it is told
//! back, sealed to whoever sent it.

use std::{
    fs::OpenOptions,
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytes::Bytes;
use nix::fcntl::OFlag;
use polydev_proto::{
    init::{MAX_REFRESHED, Refreshable, Refreshed, RefreshedFile, Secrets},
    sealed,
};
use zeroize::Zeroizing;

/// How often to look while the command runs: what is refreshed at a run's beginning is needed
/// by the runs that begin beside it.
const LOOK: Duration = Duration::from_secs(10);

/// An account's file, and what has been told of it.
#[derive(Debug)]
pub(crate) struct Account {
    path: PathBuf,
    public_key: Bytes,
    label: Bytes,
    /// As it was given, or told last; wiped when dropped.
    content: Zeroizing<Vec<u8>>,
    count: u64,
    last: Option<Refreshed>,
    look_at: Instant,
}

impl Account {
    /// `None` if nothing is to be told back. Keeps nothing else of the secrets.
    pub(crate) fn new(home: Option<&Path>, secrets: &Secrets, now: Instant) -> Option<Self> {
        let Refreshable {
            path,
            public_key,
            label,
        } = secrets.refreshable.as_ref()?;
        let file = secrets.files.iter().find(|file| file.path == *path)?;
        Some(Self {
            path: home?.join(path),
            // Slices of what was opened would keep all of it.
            public_key: Bytes::copy_from_slice(public_key),
            label: Bytes::copy_from_slice(label),
            content: file.content.to_vec().into(),
            count: 0,
            last: None,
            look_at: now + LOOK,
        })
    }

    /// Until the file is to be looked at.
    pub(crate) fn look_in(&self, now: Instant) -> Duration {
        self.look_at.saturating_duration_since(now)
    }

    /// What is to be told, if the time has come and the file has changed.
    pub(crate) fn look_if_due(&mut self, now: Instant) -> Option<Refreshed> {
        if self.look_at > now {
            return None;
        }
        self.look_at = now + LOOK;
        self.look()
    }

    /// What is to be told, if the file has changed. One that cannot be read, or is no file any
    /// more, or too long, is as it was.
    pub(crate) fn look(&mut self) -> Option<Refreshed> {
        let content = self.read()?;
        if content == self.content {
            return None;
        }
        let file = RefreshedFile {
            count: self.count + 1,
            content: Bytes::from_owner(content.clone()),
        };
        match sealed::seal_refreshed(&self.public_key, &self.label, &file) {
            Ok(sealed) => {
                self.count = file.count;
                self.content = content;
                self.last = Some(Refreshed {
                    label: self.label.clone(),
                    sealed,
                });
                self.last.clone()
            }
            Err(error) => {
                eprintln!("polydev-init: an account's file is not told back: {error}");
                None
            }
        }
    }

    /// What was told last: a driver that comes back may not have it.
    pub(crate) fn told(&self) -> Option<Refreshed> {
        self.last.clone()
    }

    fn read(&self) -> Option<Zeroizing<Vec<u8>>> {
        // The command may have put anything there, a FIFO among it.
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(flags.bits());
        let file = file.open(&self.path).ok()?;
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        // As long as it may be, so that no copy is left behind by a vector that grew.
        let mut content = Zeroizing::new(Vec::with_capacity(MAX_REFRESHED + 1));
        let read = file
            .take(MAX_REFRESHED as u64 + 1)
            .read_to_end(&mut content);
        read.ok().filter(|size| *size <= MAX_REFRESHED)?;
        Some(content)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use polydev_proto::{init::File, sealed::PrivateKey};

    struct Home {
        folder: tempfile::TempDir,
        key: PrivateKey,
        now: Instant,
    }

    impl Home {
        fn account() -> (Self, Account) {
            let home = Self {
                folder: tempfile::tempdir().unwrap(),
                key: PrivateKey::generate(),
                now: Instant::now(),
            };
            let secrets = Secrets {
                files: vec![File {
                    path: "auth.json".into(),
                    mode: 0o600,
                    content: "given".into(),
                }],
                refreshable: Some(Refreshable {
                    path: "auth.json".into(),
                    public_key: home.key.public(),
                    label: "label".into(),
                }),
                ..Secrets::default()
            };
            home.write("given");
            let account = Account::new(Some(home.folder.path()), &secrets, home.now);
            (home, account.unwrap())
        }

        fn path(&self) -> PathBuf {
            self.folder.path().join("auth.json")
        }

        fn write(&self, content: &str) {
            fs::write(self.path(), content).unwrap();
        }

        #[track_caller]
        fn open(&self, told: Option<Refreshed>) -> (u64, String) {
            let told = told.unwrap();
            let file = self.key.open_refreshed(&told.sealed, &told.label).unwrap();
            (file.count, String::from_utf8(file.content.into()).unwrap())
        }
    }

    #[test]
    fn a_file_is_told_once_for_each_change() {
        let (home, mut account) = Home::account();
        assert_eq!(account.look(), None);
        home.write("refreshed");
        let told = account.look();
        assert_eq!(home.open(told.clone()), (1, "refreshed".into()));
        assert_eq!(account.look(), None);
        assert_eq!(account.told(), told);
        // As most tools do it.
        let beside = home.folder.path().join("beside");
        fs::write(&beside, "again").unwrap();
        fs::rename(beside, home.path()).unwrap();
        assert_eq!(home.open(account.look()), (2, "again".into()));
    }

    #[test]
    fn while_the_command_runs_it_is_looked_at_every_ten_seconds() {
        let (home, mut account) = Home::account();
        home.write("refreshed");
        assert_eq!(account.look_if_due(home.now), None);
        let due = home.now + account.look_in(home.now);
        assert_eq!(due, home.now + LOOK);
        assert_eq!(home.open(account.look_if_due(due)), (1, "refreshed".into()));
        assert_eq!(account.look_in(due), LOOK);
    }

    #[test]
    fn what_is_no_file_or_too_long_is_not_told() {
        let (home, mut account) = Home::account();
        fs::remove_file(home.path()).unwrap();
        assert_eq!(account.look(), None);
        std::os::unix::fs::symlink("/etc/passwd", home.path()).unwrap();
        assert_eq!(account.look(), None);
        fs::remove_file(home.path()).unwrap();
        let mode = nix::sys::stat::Mode::S_IRWXU;
        nix::unistd::mkfifo(&home.path(), mode).unwrap();
        assert_eq!(account.look(), None);
        fs::remove_file(home.path()).unwrap();
        home.write(&"x".repeat(MAX_REFRESHED + 1));
        assert_eq!(account.look(), None);
        home.write(&"x".repeat(MAX_REFRESHED));
        assert_eq!(home.open(account.look()).0, 1);
    }
}
