//! Process 1 of a container, held by a descriptor: its end is seen and signals reach
//! it without dockerd, and never another process of the same number.

use std::{io, os::fd::OwnedFd};

use procfs::process::Process;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::{Interest, unix::AsyncFd};

/// A live process, or one that has just ended.
#[derive(Debug)]
pub(crate) struct Held {
    descriptor: AsyncFd<OwnedFd>,
    /// When the kernel says that it began, in clock ticks since boot.
    pub(crate) start: u64,
}

impl Held {
    /// # Errors
    /// If there is no such process.
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        let number = Pid::from_raw(pid.cast_signed()).ok_or(io::ErrorKind::InvalidInput)?;
        let descriptor = pidfd_open(number, PidfdFlags::NONBLOCK)?;
        // Read after it is held: it is this process's, or there is none.
        let stat = Process::new(pid.cast_signed()).and_then(|process| process.stat());
        // SAFETY: the descriptor is owned by what is returned, which neither closes nor
        // replaces it before it is deregistered.
        #[expect(
            unsafe_code,
            reason = "tokio leaves I/O safety of descriptors to its callers"
        )]
        let descriptor = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
        Ok(Self {
            descriptor: descriptor?,
            start: stat.map_err(io::Error::other)?.starttime,
        })
    }

    /// The process that was known by this pid and start, if it lives.
    pub(crate) fn find(pid: u32, start: u64) -> Option<Self> {
        Self::open(pid).ok().filter(|held| held.start == start)
    }

    /// Waits for its end.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub(crate) async fn ended(&self) {
        // A descriptor of a process never fails to be polled.
        let _readable = self.descriptor.readable().await;
    }

    /// Kills it; too late is no error.
    pub(crate) fn kill(&self) {
        let _gone = pidfd_send_signal(self.descriptor.get_ref(), Signal::KILL);
    }

    /// Sends a signal; too late is no error.
    pub(crate) fn signal(&self, number: i32) {
        if let Some(signal) = Signal::from_named_raw(number) {
            let _gone = pidfd_send_signal(self.descriptor.get_ref(), signal);
        }
    }
}

/// Whether a process is of a container, by the name of its control group.
pub(crate) fn is_of_container(pid: u32, container: &str) -> bool {
    let groups = Process::new(pid.cast_signed()).and_then(|process| process.cgroups());
    groups.is_ok_and(|groups| {
        groups
            .0
            .iter()
            .any(|group| group.pathname.contains(container))
    })
}
