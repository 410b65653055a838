//! Ensures one driver per state folder. A second driver waits, and reports which process it
//! waits for.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Held as long as the process lives; the kernel always releases it.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Why the driver cannot have the folder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("state_dir `{state_dir}` is in use by another driver, pid {pid}")]
    Held { state_dir: PathBuf, pid: String },
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
        if let Self::Held { pid, .. } = self
            && let Ok(pid) = pid.parse()
        {
            // The lock is held, so the pid in it belongs to a live driver.
            let _gone = kill(Pid::from_raw(pid), ASK_TO_LEAVE);
        }
    }
}

/// The signal that makes a driver without an agent leave.
pub const ASK_TO_LEAVE: Signal = Signal::SIGUSR2;

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
                return Err(Error::Held {
                    state_dir,
                    pid: pid.trim().to_owned(),
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
}
