//! The command's stdin: what the driver sent and the pipe or terminal has not taken yet.

use std::{
    collections::VecDeque,
    fs::File,
    io::{ErrorKind, Write},
    os::fd::AsRawFd,
};

use nix::sys::socket::{Shutdown, shutdown};
use polydev_proto::init::{Stdin, StdinAck};

use crate::terminal::END_OF_FILE;

/// Most bytes held; a driver that sends more breaks the protocol. The driver sends a message of
/// at most 64 KiB only while fewer than 128 KiB are unacknowledged.
pub(crate) const CAPACITY: usize = 256 << 10;

/// The write end of the command's stdin and what waits for it.
#[derive(Debug)]
pub(crate) struct Input {
    pipe: Option<File>,
    waiting: VecDeque<u8>,
    /// Offset of the first waiting byte.
    taken: u64,
    close: bool,
    /// A terminal is not closed; it gets the end-of-file key instead.
    is_terminal: bool,
    end_is_told: bool,
    /// The last bytes written do not end a line, so the terminal holds them back.
    in_line: bool,
}

/// The driver sent more than allowed.
#[derive(Debug)]
pub(crate) struct Overrun;

impl Input {
    /// `None` for a command that reads end of file at once. `taken` is the offset of its
    /// input, after the files.
    pub(crate) fn new(pipe: Option<File>, is_terminal: bool, taken: u64) -> Self {
        Self {
            pipe,
            waiting: VecDeque::new(),
            taken,
            close: false,
            is_terminal,
            end_is_told: false,
            in_line: false,
        }
    }

    /// No more input follows.
    pub(crate) fn close(&mut self) -> StdinAck {
        self.close = true;
        self.flush()
    }

    /// The pipe, if there is something to write to it.
    pub(crate) fn pending(&self) -> Option<&File> {
        let tells_end = self.close && self.is_terminal && !self.end_is_told;
        let has_some = tells_end || !self.waiting.is_empty();
        self.pipe.as_ref().filter(|_| has_some)
    }

    pub(crate) fn offset(&self) -> u64 {
        self.taken
    }

    /// Accepts a frame; bytes that were already accepted are skipped.
    pub(crate) fn accept(&mut self, frame: &Stdin) -> Result<(), Overrun> {
        let expected = self.taken + self.waiting.len() as u64;
        let known = expected.checked_sub(frame.offset).ok_or(Overrun)?;
        let new = usize::try_from(known)
            .ok()
            .and_then(|known| frame.data.get(known..));
        let new = new.unwrap_or_default();
        if self.pipe.is_none() {
            self.taken += new.len() as u64;
            return Ok(());
        }
        if self.waiting.len() + new.len() > CAPACITY {
            return Err(Overrun);
        }
        self.waiting.extend(new);
        self.close |= frame.close;
        Ok(())
    }

    /// Writes what the pipe accepts, and reports how much was taken.
    pub(crate) fn flush(&mut self) -> StdinAck {
        while let Some(pipe) = &mut self.pipe {
            let (chunk, _) = self.waiting.as_slices();
            if chunk.is_empty() {
                if !self.close {
                    break;
                }
                if !self.is_terminal {
                    // An agent's is a socket, of which init has other handles.
                    let _is_a_pipe = shutdown(pipe.as_raw_fd(), Shutdown::Write);
                    self.pipe = None;
                } else if !self.end_is_told {
                    // The first key flushes an unfinished line, if there is one.
                    let keys = [END_OF_FILE; 2];
                    let keys = &keys[usize::from(!self.in_line)..];
                    self.end_is_told = !matches!(
                        pipe.write(keys),
                        Err(error) if error.kind() == ErrorKind::WouldBlock
                    );
                }
                break;
            }
            match pipe.write(chunk) {
                Ok(count) => {
                    let last = count.checked_sub(1).and_then(|last| chunk.get(last));
                    self.in_line = last.is_some_and(|last| *last != b'\n');
                    self.waiting.drain(..count);
                    self.taken += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The command no longer reads: drop the rest.
                Err(_) => self.abandon(),
            }
        }
        StdinAck {
            offset: self.taken,
            closed: self.pipe.is_none() || self.end_is_told,
        }
    }

    pub(crate) fn abandon(&mut self) {
        self.pipe = None;
        self.taken += self.waiting.len() as u64;
        self.waiting = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use std::io::Read;

    fn pair() -> (File, Input) {
        let (read, write) = nix::unistd::pipe().unwrap();
        (
            File::from(read),
            Input::new(Some(File::from(write)), false, 0),
        )
    }

    fn frame(offset: u64, data: &'static str, close: bool) -> Stdin {
        Stdin {
            offset,
            data: Bytes::from(data),
            close,
        }
    }

    #[test]
    fn bytes_sent_twice_after_a_reconnect_are_written_once() {
        let (mut reader, mut input) = pair();
        input.accept(&frame(0, "hello ", false)).unwrap();
        assert_eq!(input.flush().offset, 6);
        input.accept(&frame(0, "hello world", true)).unwrap();
        assert_eq!(
            input.flush(),
            StdinAck {
                offset: 11,
                closed: true
            }
        );
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello world");
    }

    #[test]
    fn a_gap_and_too_much_input_are_refused() {
        let (_reader, mut input) = pair();
        assert!(input.accept(&frame(1, "x", false)).is_err());
        let data = Bytes::from(vec![0; CAPACITY + 1]);
        assert!(
            input
                .accept(&Stdin {
                    offset: 0,
                    data,
                    close: false
                })
                .is_err()
        );
    }

    #[test]
    fn input_that_nobody_reads_is_dropped_and_acknowledged() {
        let (reader, mut input) = pair();
        drop(reader);
        input.accept(&frame(0, "lost", false)).unwrap();
        assert_eq!(
            input.flush(),
            StdinAck {
                offset: 4,
                closed: true
            }
        );
        input.accept(&frame(4, "more", false)).unwrap();
        assert_eq!(
            input.flush(),
            StdinAck {
                offset: 8,
                closed: true
            }
        );
    }
}
