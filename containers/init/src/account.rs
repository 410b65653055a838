//! The file of a signed-in account, which the command may refresh. Init reports a refreshed
//! file, sealed to whoever sent the account.

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

/// How often to check the file while the command runs. Runs that start meanwhile need an
/// account that was refreshed at the beginning of this one.
const REFRESH_INTERVAL: Duration = Duration::from_secs(10);

/// An account's file, and what was reported of it.
#[derive(Debug)]
pub(crate) struct Account {
    path: PathBuf,
    public_key: Bytes,
    label: Bytes,
    /// The content that was given or last reported; wiped when dropped.
    content: Zeroizing<Vec<u8>>,
    count: u64,
    last: Option<Refreshed>,
    /// Whether the last refreshed content was sent on this connection.
    is_told: bool,
    look_at: Instant,
}

impl Account {
    /// `None` if the account is not to be reported. Keeps no other part of the secrets.
    pub(crate) fn new(home: Option<&Path>, secrets: &Secrets, now: Instant) -> Option<Self> {
        let Refreshable {
            path,
            public_key,
            label,
        } = secrets.refreshable.as_ref()?;
        let file = secrets.files.iter().find(|file| file.path == *path)?;
        Some(Self {
            path: home?.join(path),
            // Slices of the opened secrets would keep all of them in memory.
            public_key: Bytes::copy_from_slice(public_key),
            label: Bytes::copy_from_slice(label),
            content: file.content.to_vec().into(),
            count: 0,
            last: None,
            is_told: true,
            look_at: now + REFRESH_INTERVAL,
        })
    }

    /// Time until the next check of the file.
    pub(crate) fn look_in(&self, now: Instant) -> Duration {
        self.look_at.saturating_duration_since(now)
    }

    /// Checks the file if it is due.
    pub(crate) fn look_if_due(&mut self, now: Instant) {
        if self.look_at <= now {
            self.look_at = now + REFRESH_INTERVAL;
            self.look();
        }
    }

    /// Checks whether the file has changed. It counts as unchanged if it cannot be read, is
    /// too long, is not a JSON object, or is just being written.
    pub(crate) fn look(&mut self) {
        let Some(content) = self.read() else { return };
        if content == self.content || !looks_whole(&content) {
            return;
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
                self.is_told = false;
            }
            Err(error) => crate::shown::say(&format!("cannot report an account's file: {error}")),
        }
    }

    /// Reports again on a new connection.
    pub(crate) fn rewind(&mut self) {
        self.is_told = self.last.is_none();
    }

    pub(crate) fn is_told(&self) -> bool {
        self.is_told
    }

    /// What was not yet sent on this connection; from now on it counts as sent.
    pub(crate) fn take_untold(&mut self) -> Option<Refreshed> {
        if std::mem::replace(&mut self.is_told, true) {
            return None;
        }
        self.last.clone()
    }

    fn read(&self) -> Option<Zeroizing<Vec<u8>>> {
        // The command may have put anything there, even a FIFO.
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(flags.bits());
        let file = file.open(&self.path).ok()?;
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        // At full capacity, because a growing vector would leave copies behind.
        let mut content = Zeroizing::new(Vec::with_capacity(MAX_REFRESHED + 1));
        let read = file
            .take(MAX_REFRESHED as u64 + 1)
            .read_to_end(&mut content);
        read.ok().filter(|size| *size <= MAX_REFRESHED)?;
        Some(content)
    }
}

/// Whether it starts and ends with a brace; a file that is being written often does not.
fn looks_whole(content: &[u8]) -> bool {
    let content = content.trim_ascii();
    content.starts_with(b"{") && content.ends_with(b"}")
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

    fn look(account: &mut Account) -> Option<Refreshed> {
        account.look();
        account.take_untold()
    }

    #[test]
    fn a_file_is_told_once_for_each_change_and_again_to_each_connection() {
        let (home, mut account) = Home::account();
        account.rewind();
        assert_eq!(look(&mut account), None);
        home.write(r#"{"refreshed":1}"#);
        let told = look(&mut account);
        assert_eq!(home.open(told.clone()), (1, r#"{"refreshed":1}"#.into()));
        assert_eq!(look(&mut account), None);
        account.rewind();
        assert!(!account.is_told());
        assert_eq!(account.take_untold(), told);
        // Replaces the file, as most tools do. If two changes had no room, the last one is
        // reported.
        let beside = home.folder.path().join("beside");
        for count in [2, 3] {
            fs::write(&beside, format!("{{\"refreshed\":{count}}}\n")).unwrap();
            fs::rename(&beside, home.path()).unwrap();
            account.look();
        }
        let told = account.take_untold();
        assert_eq!(home.open(told), (3, "{\"refreshed\":3}\n".into()));
        assert_eq!(account.take_untold(), None);
    }

    #[test]
    fn while_the_command_runs_it_is_looked_at_every_ten_seconds() {
        let (home, mut account) = Home::account();
        home.write("{}");
        account.look_if_due(home.now);
        assert_eq!(account.take_untold(), None);
        let due = home.now + account.look_in(home.now);
        assert_eq!(due, home.now + REFRESH_INTERVAL);
        account.look_if_due(due);
        assert_eq!(home.open(account.take_untold()), (1, "{}".into()));
        assert_eq!(account.look_in(due), REFRESH_INTERVAL);
    }

    #[test]
    fn what_is_no_file_or_too_long_or_half_written_is_not_told() {
        let (home, mut account) = Home::account();
        fs::remove_file(home.path()).unwrap();
        assert_eq!(look(&mut account), None);
        std::os::unix::fs::symlink("/etc/passwd", home.path()).unwrap();
        assert_eq!(look(&mut account), None);
        fs::remove_file(home.path()).unwrap();
        let mode = nix::sys::stat::Mode::S_IRWXU;
        nix::unistd::mkfifo(&home.path(), mode).unwrap();
        assert_eq!(look(&mut account), None);
        fs::remove_file(home.path()).unwrap();
        let long = |length: usize| format!("{{{}}}", " ".repeat(length - 2));
        for refused in ["", "{", "{\"a\":1", "[]", &long(MAX_REFRESHED + 1)] {
            home.write(refused);
            assert_eq!(look(&mut account), None, "{refused:.10}");
        }
        home.write(&long(MAX_REFRESHED));
        assert_eq!(home.open(look(&mut account)).0, 1);
    }
}
