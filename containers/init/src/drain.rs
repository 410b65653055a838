//! The output of a plain task, moved into Nomad's FIFOs without a copy where the kernel
//! supports it (`splice`), and to Docker's log driver too if the operator wants it there. A full
//! FIFO stops the command, and no output is lost. The FIFOs are open for reading too, so a
//! reader that goes away and comes back causes no end of file on either side.

use std::{
    fs::File,
    io::{self, ErrorKind, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::poll::PollFlags;
use rustix::{
    io::{Errno, ioctl_fionread},
    pipe::{SpliceFlags, splice, tee},
};

use crate::shown::say;

/// How much one call moves; a pipe holds as much.
const PIECE: usize = 64 << 10;

/// One stream from the command to its FIFO.
#[derive(Debug)]
pub(crate) struct Drain {
    /// `None` after end of file.
    from: Option<File>,
    /// Whether `from` is a terminal, which does not support splice.
    tty: bool,
    to: Sink,
    /// Where a second copy goes.
    copy: Option<Second>,
    full: Option<Full>,
}

/// Where output goes.
#[derive(Debug)]
struct Sink {
    file: File,
    /// Bytes read from a terminal but not yet written.
    held: Vec<u8>,
}

#[derive(Debug)]
struct Second {
    sink: Sink,
    /// How much of what is next in the pipe it has already.
    ahead: usize,
}

/// What has no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Full {
    To,
    Copy,
}

impl Drain {
    /// All descriptors must be non-blocking.
    pub(crate) fn new(from: File, to: OwnedFd, copy: Option<OwnedFd>, tty: bool) -> Self {
        Self {
            from: Some(from),
            tty,
            to: Sink::new(to),
            copy: copy.map(|copy| Second {
                sink: Sink::new(copy),
                ahead: 0,
            }),
            full: None,
        }
    }

    /// What to poll for before [`Drain::advance`]; `None` if there is nothing to move.
    pub(crate) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match (self.full, &self.copy, &self.from) {
            (Some(Full::To), ..) => Some((self.to.file.as_fd(), PollFlags::POLLOUT)),
            (Some(Full::Copy), Some(copy), _) => Some((copy.sink.file.as_fd(), PollFlags::POLLOUT)),
            (_, _, Some(from)) => Some((from.as_fd(), PollFlags::POLLIN)),
            _ => None,
        }
    }

    /// Moves what it can. After a write to Nomad fails, the rest of the command's output is
    /// lost, and a command that continues to write gets SIGPIPE. After a write to Docker fails,
    /// there is no second copy any more.
    pub(crate) fn advance(&mut self) {
        let moved = match self.tty {
            true => self.pass(),
            false => self.splice(),
        };
        if let Err(error) = moved {
            say(&format!("cannot write output, the rest is lost: {error}"));
            self.from = None;
            self.to.held.clear();
            self.copy = None;
            self.full = None;
        }
    }

    /// Whether everything was moved and the reader has read it.
    pub(crate) fn is_read(&self) -> bool {
        // Anything but a FIFO, such as /dev/null, holds nothing.
        self.is_moved() && ioctl_fionread(&self.to.file).unwrap_or(0) == 0
    }

    fn is_moved(&self) -> bool {
        let is_copied = self.copy.as_ref().is_none_or(|copy| copy.sink.is_empty());
        self.from.is_none() && self.to.is_empty() && is_copied
    }

    fn splice(&mut self) -> io::Result<()> {
        let Some(from) = &self.from else {
            return Ok(());
        };
        let is_next = self.copy.as_ref().is_some_and(|copy| copy.ahead == 0);
        if is_next && let Some(copy) = &mut self.copy {
            match tee(from, &copy.sink.file, PIECE, SpliceFlags::NONBLOCK) {
                Ok(0) => {
                    self.end();
                    return Ok(());
                }
                Ok(count) => copy.ahead = count,
                Err(Errno::AGAIN) => {
                    self.full = has_input(from).then_some(Full::Copy);
                    return Ok(());
                }
                Err(Errno::INTR) => return Ok(()),
                Err(errno) => self.give_up_copy(errno.into()),
            }
        }
        let Some(from) = &self.from else {
            return Ok(());
        };
        // What goes to one goes to both.
        let most = self.copy.as_ref().map_or(PIECE, |copy| copy.ahead);
        match splice(from, None, &self.to.file, None, most, SpliceFlags::NONBLOCK) {
            Ok(0) => self.end(),
            Ok(count) => {
                self.full = None;
                if let Some(copy) = &mut self.copy {
                    copy.ahead -= count;
                }
            }
            // Nothing to read or no room: tried again when either may have changed.
            Err(Errno::AGAIN) => self.full = has_input(from).then_some(Full::To),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }

    /// Reads and writes, because a terminal does not support splice.
    fn pass(&mut self) -> io::Result<()> {
        let is_free = self.to.is_empty() && self.copy.as_ref().is_none_or(|c| c.sink.is_empty());
        if is_free && let Some(from) = &mut self.from {
            let mut chunk = [0; 16 << 10];
            match from.read(&mut chunk) {
                // Reading a terminal fails, instead of ending, when nobody uses it any
                // longer.
                Ok(0) => self.end(),
                Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => self.end(),
                Ok(count) => {
                    self.to.held.extend_from_slice(&chunk[..count]);
                    if let Some(copy) = &mut self.copy {
                        copy.sink.held.extend_from_slice(&chunk[..count]);
                    }
                }
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(error),
            }
        }
        self.full = None;
        if let Some(copy) = &mut self.copy {
            match copy.sink.write() {
                Ok(true) => {}
                Ok(false) => self.full = Some(Full::Copy),
                Err(error) => self.give_up_copy(error),
            }
        }
        if !self.to.write()? {
            self.full = Some(Full::To);
        }
        Ok(())
    }

    fn give_up_copy(&mut self, error: io::Error) {
        say(&format!(
            "cannot write output to Docker, which gets no more: {error}"
        ));
        self.copy = None;
        self.full = None;
    }

    fn end(&mut self) {
        self.from = None;
        self.full = None;
    }
}

impl Sink {
    fn new(descriptor: OwnedFd) -> Self {
        Self {
            file: descriptor.into(),
            held: Vec::new(),
        }
    }

    fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Returns whether all is written.
    fn write(&mut self) -> io::Result<bool> {
        while !self.held.is_empty() {
            match self.file.write(&self.held) {
                Ok(count) => drop(self.held.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

fn has_input(from: &File) -> bool {
    ioctl_fionread(from).unwrap_or(0) > 0
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
        let mut drain = Drain::new(from.into(), to, None, false);
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
        let mut drain = Drain::new(from.into(), to, None, false);
        let mut command = File::from(command);
        while command.write(&[0; 4096]).is_ok() {
            advance_while_possible(&mut drain);
        }
        drain.advance();
        assert_eq!(drain.interest().unwrap().1, PollFlags::POLLOUT);
    }

    /// Both get every byte, however late either reads, and the slower one is waited for.
    #[test]
    fn a_copy_is_as_whole_as_the_first() {
        let (folder, to) = fifo();
        let (docker, copy) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let (from, command) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let (mut docker, mut command) = (File::from(docker), File::from(command));
        let mut drain = Drain::new(from.into(), to, Some(copy), false);
        let mut nomad = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(folder.path().join("fifo"))
            .unwrap();
        let sent: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let (mut written, mut both) = (0, [Vec::new(), Vec::new()]);
        let mut turn = 0;
        while both.iter().any(|one| one.len() < sent.len()) {
            if written < sent.len() {
                match command.write(&sent[written..]) {
                    Ok(count) => written += count,
                    Err(error) => assert!(is_transient(&error), "{error}"),
                }
            }
            advance_while_possible(&mut drain);
            turn += 1;
            // One reads little and often, the other much and seldom.
            for (reader, received, size, often) in
                [(&mut nomad, 0, 7_000, 1), (&mut docker, 1, 90_000, 5)]
            {
                let mut chunk = vec![0; size];
                if turn % often == 0 {
                    match reader.read(&mut chunk) {
                        Ok(count) => both[received].extend_from_slice(&chunk[..count]),
                        Err(error) => assert!(is_transient(&error), "{error}"),
                    }
                }
            }
        }
        assert!(both.iter().all(|one| *one == sent));
    }

    #[test]
    fn nomad_gets_the_rest_when_docker_is_gone() {
        let (folder, to) = fifo();
        let (docker, copy) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let (from, command) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let mut command = File::from(command);
        let mut drain = Drain::new(from.into(), to, Some(copy), false);
        command.write_all(b"one\n").unwrap();
        advance_while_possible(&mut drain);
        drop(docker);
        command.write_all(b"two\n").unwrap();
        advance_while_possible(&mut drain);
        let mut text = [0; 8];
        let mut nomad = File::open(folder.path().join("fifo")).unwrap();
        nomad.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"one\ntwo\n");
    }
}
