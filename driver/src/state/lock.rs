//! Ensures one driver per state folder. A second driver waits, and reports which process it
//! waits for.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use procfs::LockType;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Held as long as the process lives; the kernel always releases it.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Why the driver cannot have the folder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("state_dir `{state_dir}` is in use by another driver, pid {pid}")]
    Held {
        state_dir: PathBuf,
        /// As the holder has written it. A holder writes it after it has the lock, so it may be
        /// an earlier holder's, or missing.
        pid: String,
        /// Of the locked file.
        inode: u64,
    },
    #[error("cannot lock state_dir `{state_dir}`")]
    Lock {
        state_dir: PathBuf,
        source: io::Error,
    },
}

impl Error {
    /// Asks the holder to leave, which it does if it has no agent. An agent that crashed
    /// and could not reconnect to the holder has started this process instead.
    pub fn ask_to_leave(&self) {
        let Self::Held { pid, inode, .. } = self else {
            return;
        };
        let Some(pid) = pid.parse().ok().and_then(Pid::from_raw) else {
            return;
        };
        // Opened first: what is told is then the process that was looked at.
        if let Ok(process) = pidfd_open(pid, PidfdFlags::empty())
            && holds(pid, *inode)
        {
            let _gone = pidfd_send_signal(process, ASK_TO_LEAVE);
        }
    }
}

/// Whether the kernel says that this process has locked a file of this number. The number of the
/// file's device is not compared: some file systems have another one there.
fn holds(pid: Pid, inode: u64) -> bool {
    procfs::locks().is_ok_and(|locks| {
        locks.iter().any(|lock| {
            matches!(lock.lock_type, LockType::FLock)
                && lock.inode == inode
                && lock.pid == Some(pid.as_raw_pid())
        })
    })
}

/// The signal that makes a driver without an agent leave.
const ASK_TO_LEAVE: Signal = Signal::USR2;

impl Lock {
    /// Locks the folder without waiting; creates it if necessary, for root alone.
    ///
    /// # Errors
    /// [`Error::Held`] with the pid of the holder.
    pub fn take(state_dir: &Path) -> Result<Self, Error> {
        let state_dir = state_dir.to_owned();
        let failed = |source| Error::Lock {
            state_dir: state_dir.clone(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&state_dir)
            .map_err(failed)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options
            .open(state_dir.join("driver.lock"))
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                file.read_to_string(&mut pid).map_err(failed)?;
                let inode = file.metadata().map_err(failed)?.ino();
                return Err(Error::Held {
                    state_dir,
                    pid: pid.trim().to_owned(),
                    inode,
                });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(failed)?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::{WaitOptions, kill_process, waitpid};

    use super::*;

    #[test]
    fn a_second_driver_is_told_the_pid_of_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let first = Lock::take(&state).unwrap();
        let refused = Lock::take(&state).unwrap_err().to_string();
        assert!(
            refused.ends_with(&format!("pid {}", std::process::id())),
            "{refused}"
        );
        drop(first);
        Lock::take(&state).unwrap();
    }

    #[test]
    fn only_a_process_that_has_the_lock_is_asked_to_leave() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("driver.lock");
        // The pid of an earlier holder is that of another program by now. That one is stopped, so
        // that a signal stays with it.
        let mut other = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&other);
        kill_process(pid, Signal::STOP).unwrap();
        let stopped = waitpid(Some(pid), WaitOptions::UNTRACED).unwrap().unwrap();
        assert!(stopped.1.stopped());
        std::fs::write(&path, other.id().to_string()).unwrap();
        let held = File::open(&path).unwrap();
        held.lock().unwrap();
        let refused = Lock::take(folder.path()).unwrap_err();
        refused.ask_to_leave();
        let status = procfs::process::Process::new(other.id().cast_signed())
            .and_then(|process| process.status())
            .unwrap();
        assert_eq!(status.shdpnd, 0, "a signal waits for it");
        other.kill().unwrap();
        other.wait().unwrap();
        let Error::Held { inode, .. } = refused else {
            panic!("{refused}");
        };
        let own = Pid::from_raw(std::process::id().cast_signed()).unwrap();
        assert!(holds(own, inode));
    }
}
