//! The input of a run: the bytes of its files, and then its stdin, as one stream to the driver.
//! Input that the command has not taken is kept, for a driver that restarts.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use polydev_proto::node::{self, RunInput, run_event as driver, run_input};
use tokio::time::timeout;

use super::{
    Connection,
    request::{Invalid, Own},
};

/// Largest number of bytes in one message of the API.
const MAX_PIECE: usize = 64 << 10;
/// Largest number of bytes on their way to the command.
const MAX_KEPT: u64 = 256 << 10;
/// How long a command may need to take the shim's own input.
const TAKEN_TIMEOUT: Duration = Duration::from_secs(2 * 60);

/// The input that the command has not taken.
#[derive(Debug)]
pub struct Input {
    /// How many bytes of the input are files.
    files: u64,
    sent: u64,
    taken: u64,
    closed: bool,
    kept: VecDeque<node::Stdin>,
    own: Option<Own>,
}

impl Input {
    /// The input of a run, from the offset that the run has reached.
    #[must_use]
    pub fn new(connection: &Connection, own: Option<Own>) -> Self {
        Self {
            files: connection.files_bytes,
            sent: connection.stdin_offset,
            taken: connection.stdin_offset,
            closed: false,
            kept: VecDeque::new(),
            own,
        }
    }

    /// Whether bytes of the files are missing. The command cannot start without them.
    pub(super) fn lacks_files(&self) -> bool {
        self.sent < self.files
    }

    /// Whether more may be sent.
    pub(super) fn is_open(&self) -> bool {
        self.sent.saturating_sub(self.taken) < MAX_KEPT
    }

    /// Bytes of the caller's files.
    pub(super) fn file_bytes(&mut self, data: Bytes) -> Result<run_input::Input, Invalid> {
        check_length("files", &data)?;
        let is_own = |own: &Own| own.from < self.files;
        let left = match self.own.as_ref().is_some_and(is_own) {
            true => 0,
            false => self.files.saturating_sub(self.sent),
        };
        if data.len() as u64 > left {
            return Err(Invalid::Value {
                field: "files",
                given: format!("{} bytes, of which only {left} are expected", data.len()),
                allowed: "no more bytes than the sizes in `start.files` say",
            });
        }
        Ok(self.keep(data))
    }

    /// Bytes of the caller's stdin.
    pub(super) fn stdin(&mut self, data: Bytes) -> Result<run_input::Input, Invalid> {
        check_length("stdin", &data)?;
        if self.lacks_files() {
            return Err(Invalid::Value {
                field: "stdin",
                given: format!(
                    "sent with {} bytes of the files missing",
                    self.files - self.sent
                ),
                allowed: "sent after all files",
            });
        }
        if self.own.as_ref().is_some_and(|own| own.closes) {
            return Err(Invalid::Value {
                field: "stdin",
                given: "sent".into(),
                allowed: "absent, because a prompt of this length is the command's stdin",
            });
        }
        Ok(self.keep(data))
    }

    /// The caller has closed its input. If the shim still has input of its own, the end follows
    /// after this input.
    pub(super) fn close(&mut self) -> Option<run_input::Input> {
        if self.own_is_due() {
            return None;
        }
        self.closed = true;
        Some(CLOSE)
    }

    /// Whether the shim has own input that is not sent.
    pub(super) fn has_own(&self) -> bool {
        let is_left = |own: &Own| self.sent < own.end() || own.closes;
        !self.closed && self.own.as_ref().is_some_and(is_left)
    }

    /// Whether the shim's own input is next.
    pub(super) fn own_is_due(&self) -> bool {
        let is_turn = |own: &Own| self.sent >= own.from;
        self.has_own() && self.own.as_ref().is_some_and(is_turn)
    }

    fn is_taken(&self) -> bool {
        !self.has_own() && self.taken >= self.sent
    }

    /// The next part of the shim's own input, or its end.
    pub(super) fn take_own(&mut self) -> run_input::Input {
        let rest = self.own.as_ref().and_then(|own| {
            let at = usize::try_from(self.sent.checked_sub(own.from)?).ok()?;
            let end = own.bytes.len().min(at.checked_add(MAX_PIECE)?);
            (at < end).then(|| own.bytes.slice(at..end))
        });
        match rest {
            Some(chunk) => self.keep(chunk),
            None => {
                self.closed = true;
                CLOSE
            }
        }
    }

    fn keep(&mut self, data: Bytes) -> run_input::Input {
        let stdin = node::Stdin {
            offset: self.sent,
            data,
        };
        self.sent += stdin.data.len() as u64;
        self.kept.push_back(stdin.clone());
        run_input::Input::Stdin(stdin)
    }

    /// The driver has reported how much the command has taken.
    pub(super) fn taken(&mut self, offset: u64) {
        self.taken = self.taken.max(offset);
        self.kept
            .retain(|kept| kept.offset + kept.data.len() as u64 > offset);
    }

    /// The input that a restarted driver needs again.
    pub(super) fn resend(&mut self, offset: u64) -> VecDeque<run_input::Input> {
        self.taken(offset);
        let kept = self.kept.iter().cloned().map(run_input::Input::Stdin);
        kept.chain(self.closed.then_some(CLOSE)).collect()
    }
}

const CLOSE: run_input::Input = run_input::Input::CloseStdin(node::CloseStdin {});

fn check_length(field: &'static str, data: &Bytes) -> Result<(), Invalid> {
    if data.len() <= MAX_PIECE {
        return Ok(());
    }
    Err(Invalid::Value {
        field,
        given: format!("{} bytes", data.len()),
        allowed: "at most 65536 bytes in each message",
    })
}

/// Gives the shim's own input to a run without a caller, after the `pending` input. Waits until
/// the command has taken it.
pub async fn feed(
    connection: &mut Connection,
    mut input: Input,
    mut pending: VecDeque<run_input::Input>,
) {
    let slot_id = connection.slot_id.clone();
    let fed = async {
        while !input.is_taken() || !pending.is_empty() {
            let gives = !pending.is_empty() || (input.own_is_due() && input.is_open());
            tokio::select! {
                permit = connection.inputs.reserve(), if gives => match permit {
                    Ok(permit) => {
                        let next = pending.pop_front().unwrap_or_else(|| input.take_own());
                        permit.send(RunInput { input: Some(next) });
                    }
                    Err(_) => return Err("the driver ended the stream".to_owned()),
                },
                event = connection.events.next() => {
                    let event = event.map_err(|status| status.message().to_owned())?;
                    match event.and_then(|event| event.event) {
                        Some(driver::Event::StdinTaken(taken)) => input.taken(taken.offset),
                        // The command needed no more input.
                        Some(driver::Event::Ended(_)) => return Ok(()),
                        Some(_) => {}
                        None => return Err("the driver ended the stream".to_owned()),
                    }
                }
            }
        }
        Ok(())
    };
    let fed = timeout(TAKEN_TIMEOUT, fed).await;
    if let Err(reason) = fed.unwrap_or_else(|_| Err("not taken within 2 minutes".into())) {
        tracing::warn!(%slot_id, reason, "a run did not get all of its input");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(files: u64, own: Option<Own>) -> Input {
        Input {
            files,
            sent: 0,
            taken: 0,
            closed: false,
            kept: VecDeque::new(),
            own,
        }
    }

    /// The offset of each input; that of the end is `u64::MAX`.
    fn offsets(inputs: impl IntoIterator<Item = run_input::Input>) -> Vec<u64> {
        let offset = |input| match input {
            run_input::Input::Stdin(stdin) => stdin.offset,
            run_input::Input::CloseStdin(_) => u64::MAX,
            other => panic!("{other:?} is not sent again"),
        };
        inputs.into_iter().map(offset).collect()
    }

    #[test]
    fn a_driver_that_restarts_gets_the_input_that_the_command_has_not_taken() {
        let mut input = input(3, None);
        input.file_bytes("abc".into()).unwrap();
        for text in ["def", "ghi"] {
            input.stdin(text.into()).unwrap();
        }
        input.taken(3);
        assert!(input.close().is_some());
        assert_eq!(offsets(input.resend(4)), [3, 6, u64::MAX]);
        assert_eq!(offsets(input.resend(9)), [u64::MAX]);
    }

    #[test]
    fn files_come_whole_before_stdin() {
        let mut input = input(3, None);
        assert!(input.stdin("x".into()).is_err());
        assert!(input.file_bytes("abcd".into()).is_err());
        input.file_bytes("ab".into()).unwrap();
        input.file_bytes("c".into()).unwrap();
        assert!(input.file_bytes("d".into()).is_err());
        assert!(input.stdin(vec![0; MAX_PIECE + 1].into()).is_err());
        input.stdin("x".into()).unwrap();
    }

    #[test]
    fn files_that_came_with_the_run_are_followed_by_its_callers_stdin() {
        let own = Own {
            from: 0,
            bytes: "abc".into(),
            closes: false,
        };
        let mut input = input(3, Some(own));
        assert!(input.file_bytes("abc".into()).is_err());
        assert!(input.own_is_due());
        assert_eq!(offsets([input.take_own()]), [0]);
        assert!(!input.own_is_due());
        assert_eq!(offsets([input.stdin("x".into()).unwrap()]), [3]);
        assert!(input.close().is_some());
    }

    #[test]
    fn a_long_prompt_follows_the_files_and_ends_the_input() {
        let bytes = Bytes::from(vec![b'a'; MAX_PIECE + 1]);
        let mut input = input(
            2,
            Some(Own {
                from: 2,
                bytes,
                closes: true,
            }),
        );
        assert!(!input.own_is_due());
        input.file_bytes("ab".into()).unwrap();
        assert!(input.stdin("x".into()).is_err());
        assert!(input.close().is_none(), "the prompt is not cut short");
        let mut given = Vec::new();
        while input.own_is_due() {
            given.push(input.take_own());
        }
        assert_eq!(offsets(given), [2, 2 + MAX_PIECE as u64, u64::MAX]);
    }
}
