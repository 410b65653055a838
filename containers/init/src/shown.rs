//! The streams of a plain task as those of process 1. Programs write to `/proc/1/fd/1` what is to
//! be in the log: cron's jobs, and log files that are links to it.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, OwnedFd},
    process::Stdio,
    sync::OnceLock,
};

use nix::{fcntl::OFlag, unistd::pipe2};
use rustix::stdio::{dup2_stderr, dup2_stdout};

/// This process's own stderr, for its own words.
static OWN_STDERR: OnceLock<File> = OnceLock::new();

/// Tells something to whoever reads the container's log.
pub(crate) fn say(message: &str) {
    let line = format!("polydev-init: {message}\n");
    // A message that nobody takes must not stop this process.
    let _nobody_reads = match OWN_STDERR.get() {
        Some(mut own) => own.write_all(line.as_bytes()),
        None => io::stderr().write_all(line.as_bytes()),
    };
}

/// Dropped, it gives this process back its own streams, so that the task's have an end.
#[derive(Debug)]
pub(crate) struct Shown {
    own: [OwnedFd; 2],
}

/// Pipes for a command's output: the ends to read from, stdout first, and those of the command.
pub(crate) struct Pipes {
    pub(crate) read: [OwnedFd; 2],
    pub(crate) write: [Stdio; 2],
    pub(crate) shown: Shown,
}

impl Shown {
    /// Makes pipes, with the ends of the command as this process's stdout and stderr too.
    pub(crate) fn pipes() -> io::Result<Pipes> {
        let [stdout, stderr] = [pipe2(OFlag::O_CLOEXEC)?, pipe2(OFlag::O_CLOEXEC)?];
        let shown = Self {
            own: own_streams()?,
        };
        let words = shown.own[1].try_clone()?;
        OWN_STDERR.get_or_init(|| words.into());
        dup2_stdout(&stdout.1)?;
        dup2_stderr(&stderr.1)?;
        Ok(Pipes {
            read: [stdout.0, stderr.0],
            write: [stdout.1.into(), stderr.1.into()],
            shown,
        })
    }
}

/// Copies of this process's own stdout and stderr.
pub(crate) fn own_streams() -> io::Result<[OwnedFd; 2]> {
    Ok([
        io::stdout().as_fd().try_clone_to_owned()?,
        io::stderr().as_fd().try_clone_to_owned()?,
    ])
}

impl Drop for Shown {
    fn drop(&mut self) {
        let [stdout, stderr] = &self.own;
        if let Err(errno) = dup2_stdout(stdout).and_then(|()| dup2_stderr(stderr)) {
            say(&format!("cannot take back its own streams: {errno}"));
        }
    }
}
