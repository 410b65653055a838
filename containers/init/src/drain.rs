//! The output of a plain task, moved into Nomad's FIFOs without a copy where the kernel
//! supports it (`splice`). A full FIFO stops the command, and no output is lost. The FIFOs
//! are open for reading too, so a reader that goes away and comes back causes no end of
//! file on either side.

use std::{
    fs::File,
    io::{self, ErrorKind, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::poll::PollFlags;
use rustix::{
    io::{Errno, ioctl_fionread},
    pipe::{SpliceFlags, splice},
};

/// How much one call moves; a pipe holds as much.
const PIECE: usize = 64 << 10;

/// One stream from the command to its FIFO.
#[derive(Debug)]
pub(crate) struct Drain {
    /// `None` after end of file.
    from: Option<File>,
    /// Whether `from` is a terminal, which does not support splice.
    tty: bool,
    to: File,
    /// Bytes read from a terminal but not yet written.
    held: Vec<u8>,
    full: bool,
}

impl Drain {
    /// `from` and `to` must be non-blocking.
    pub(crate) fn new(from: File, to: OwnedFd, tty: bool) -> Self {
        Self {
            from: Some(from),
            tty,
            to: to.into(),
            held: Vec::new(),
            full: false,
        }
    }

    /// What to poll for before [`Drain::advance`]; `None` if there is nothing to move.
    pub(crate) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match &self.from {
            _ if self.full => Some((self.to.as_fd(), PollFlags::POLLOUT)),
            Some(from) => Some((from.as_fd(), PollFlags::POLLIN)),
            None => None,
        }
    }

    /// Moves what it can. After a write fails, the rest of the command's output is lost,
    /// and a command that continues to write gets SIGPIPE.
    pub(crate) fn advance(&mut self) {
        let moved = if self.tty { self.copy() } else { self.splice() };
        if let Err(error) = moved {
            eprintln!("polydev-init: cannot write output, the rest is lost: {error}");
            self.from = None;
            self.held.clear();
            self.full = false;
        }
    }

    /// Whether everything was moved and the reader has read it.
    pub(crate) fn is_read(&self) -> bool {
        // Anything but a FIFO, such as /dev/null, holds nothing.
        self.is_moved() && ioctl_fionread(&self.to).unwrap_or(0) == 0
    }

    fn is_moved(&self) -> bool {
        self.from.is_none() && self.held.is_empty()
    }

    fn splice(&mut self) -> io::Result<()> {
        let Some(from) = &self.from else {
            return Ok(());
        };
        match splice(from, None, &self.to, None, PIECE, SpliceFlags::NONBLOCK) {
            Ok(0) => self.end(),
            Ok(_) => self.full = false,
            // Nothing to read or no room: tried again when either may have changed.
            Err(Errno::AGAIN) => self.full = ioctl_fionread(from).unwrap_or(0) > 0,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }

    fn copy(&mut self) -> io::Result<()> {
        if self.held.is_empty()
            && let Some(from) = &mut self.from
        {
            let mut chunk = [0; 16 << 10];
            match from.read(&mut chunk) {
                // Reading a terminal fails, instead of ending, when nobody uses it any
                // longer.
                Ok(0) => self.end(),
                Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => self.end(),
                Ok(count) => self.held.extend_from_slice(&chunk[..count]),
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(error),
            }
        }
        while !self.held.is_empty() {
            match self.to.write(&self.held) {
                Ok(count) => drop(self.held.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.full = true;
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        self.full = false;
        Ok(())
    }

    fn end(&mut self) {
        self.from = None;
        self.full = false;
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{
        fcntl::OFlag,
        sys::stat::Mode,
        unistd::{mkfifo, pipe2},
    };
    use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt};

    fn fifo() -> (tempfile::TempDir, OwnedFd) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let to = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)
            .unwrap();
        (folder, to.into())
    }

    fn advance_while_possible(drain: &mut Drain) {
        for _ in 0..100 {
            drain.advance();
        }
    }

    /// A reader that is late, or goes away and comes back, gets every byte.
    #[test]
    fn no_byte_is_lost_whatever_the_reader_does() {
        let (folder, to) = fifo();
        let (from, command) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let mut command = File::from(command);
        let mut drain = Drain::new(from.into(), to, false);
        let sent: Vec<u8> = (0..400_000_u32).flat_map(u32::to_le_bytes).collect();
        let (mut written, mut received) = (0, Vec::new());
        while received.len() < sent.len() {
            if written < sent.len() {
                match command.write(&sent[written..]) {
                    Ok(count) => written += count,
                    Err(error) => assert!(is_transient(&error), "{error}"),
                }
            }
            advance_while_possible(&mut drain);
            assert!(!drain.is_read());
            // Nomad's current reader.
            let mut reader = OpenOptions::new()
                .read(true)
                .custom_flags(OFlag::O_NONBLOCK.bits())
                .open(folder.path().join("fifo"))
                .unwrap();
            let mut chunk = [0; 30_000];
            let count = reader.read(&mut chunk).unwrap();
            received.extend_from_slice(&chunk[..count]);
        }
        assert!(received == sent);
        drop(command);
        advance_while_possible(&mut drain);
        assert!(drain.is_read());
    }

    #[test]
    fn a_full_fifo_is_waited_for_and_not_spun_on() {
        let (_folder, to) = fifo();
        let (from, command) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let mut drain = Drain::new(from.into(), to, false);
        let mut command = File::from(command);
        while command.write(&[0; 4096]).is_ok() {
            advance_while_possible(&mut drain);
        }
        drain.advance();
        assert_eq!(drain.interest().unwrap().1, PollFlags::POLLOUT);
    }
}
