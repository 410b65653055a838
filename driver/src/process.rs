//! Process 1 of a container, held by a descriptor. So the driver sees its end and sends it
//! signals without dockerd, and never reaches another process with the same number.

use std::{io, ops::RangeInclusive, os::fd::OwnedFd};

use procfs::process::Process;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::{Interest, unix::AsyncFd};

/// Real-time signals that programs may use: `signal(7)`.
pub(crate) const REAL_TIME: RangeInclusive<i32> = 34..=64;

/// A process that lives or has just ended.
#[derive(Debug)]
pub(crate) struct Held {
    descriptor: AsyncFd<OwnedFd>,
    /// Start time according to the kernel, in clock ticks since boot.
    pub(crate) start: u64,
}

impl Held {
    /// # Errors
    /// If the process does not exist.
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        let number = Pid::from_raw(pid.cast_signed()).ok_or(io::ErrorKind::InvalidInput)?;
        let descriptor = pidfd_open(number, PidfdFlags::NONBLOCK)?;
        // Read after the descriptor is open: it belongs to this process, or the read fails.
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

    /// The process with this pid and start time, if it is alive.
    pub(crate) fn find(pid: u32, start: u64) -> Option<Self> {
        Self::open(pid).ok().filter(|held| held.start == start)
    }

    /// Waits until the process ends.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub(crate) async fn ended(&self) {
        // Polling a process descriptor never fails.
        let _readable = self.descriptor.readable().await;
    }

    /// Kills the process; an ended process is not an error.
    pub(crate) fn kill(&self) {
        let _gone = pidfd_send_signal(self.descriptor.get_ref(), Signal::KILL);
    }

    /// Sends a signal; an ended process is not an error.
    pub(crate) fn signal(&self, number: i32) {
        let real_time = REAL_TIME.contains(&number).then(|| {
            // SAFETY: it is not for this process, whose libc keeps some numbers for itself.
            #[expect(unsafe_code, reason = "real-time signals have no names")]
            unsafe {
                Signal::from_raw_unchecked(number)
            }
        });
        if let Some(signal) = Signal::from_named_raw(number).or(real_time) {
            let _gone = pidfd_send_signal(self.descriptor.get_ref(), signal);
        }
    }
}

/// Whether a process belongs to a container, by the name of its control group.
pub(crate) fn is_of_container(pid: u32, container: &str) -> bool {
    let groups = Process::new(pid.cast_signed()).and_then(|process| process.cgroups());
    groups.is_ok_and(|groups| {
        groups
            .0
            .iter()
            .any(|group| group.pathname.contains(container))
    })
}
