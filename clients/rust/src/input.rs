//! What a caller sends to a run: kept until no broken connection can lose it any more.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use polydev_proto::runtime::{
    Accepted, CloseStdin, RunInput, Signal, TerminalSize, run_input::Input as Message,
};
use tokio::sync::Notify;

/// The most the API takes in one message.
const CHUNK: usize = 64 << 10;
/// Bytes that wait to be sent before whoever writes more has to wait.
const WAITING_MOST: u64 = 1 << 20;
/// Bytes that are kept after they were sent: more than lie between caller and command, with
/// all windows on the way full.
const KEPT: u64 = 8 << 20;
/// Signals that wait to be sent; further ones are left out.
const SIGNALS_MOST: usize = 64;

/// To a run, from its caller; clones share it.
#[derive(Debug, Clone)]
pub struct Input(Arc<Shared>);

/// The run takes no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the run takes no more input")]
pub struct Closed;

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is something to send, or another call to send it with.
    news: Notify,
    room: Notify,
}

/// One stream of bytes: those of the run's files, then its stdin.
#[derive(Debug)]
struct State {
    /// How many of them are the files'.
    files: u64,
    /// Where the first byte is in the stdin of a run that others have written to.
    origin: Origin,
    /// The last of it, in pieces of at most `CHUNK`, none with bytes of files and of stdin.
    log: VecDeque<Bytes>,
    begin: u64,
    end: u64,
    /// Up to here the call that is open has sent it; `None` until it is known where it begins.
    sent: Option<u64>,
    call: u64,
    /// Nothing follows.
    closed: bool,
    close_sent: bool,
    /// What goes before any bytes.
    urgent: VecDeque<Message>,
    over: bool,
}

/// Where what the caller sends begins.
#[derive(Debug, Clone, Copy)]
enum Origin {
    /// With the run: all of its input is the caller's.
    Run,
    /// Where the run had come to, as soon as it has said so: others have sent what was before,
    /// and may send more.
    Attach(Option<u64>),
}

/// Bytes that a broken connection has lost.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the run has {has} bytes of its input, and those from {kept} on are kept")]
pub(crate) struct Gone {
    has: u64,
    kept: u64,
}

impl Input {
    /// Of a run with so many bytes of files that follow; `is_new` says that none of its input
    /// has ever been sent.
    pub(crate) fn of_run(files: u64, is_new: bool) -> Self {
        Self::new(files, Origin::Run, is_new.then_some(0))
    }

    /// Of a run that goes on already.
    pub(crate) fn of_attach() -> Self {
        Self::new(0, Origin::Attach(None), None)
    }

    fn new(files: u64, origin: Origin, sent: Option<u64>) -> Self {
        let state = State {
            files,
            origin,
            log: VecDeque::new(),
            begin: 0,
            end: 0,
            sent,
            call: 0,
            closed: false,
            close_sent: false,
            urgent: VecDeque::new(),
            over: false,
        };
        Self(Arc::new(Shared {
            state: state.into(),
            news: Notify::new(),
            room: Notify::new(),
        }))
    }

    /// The bytes of the files whose `size` the run was told, one file's after the other's, and
    /// then the command's stdin. Waits while much has not been sent.
    ///
    /// # Errors
    /// [`Closed`] once the run is over or its stdin closed.
    ///
    /// # Cancel safety
    /// Some of the bytes may have been taken.
    pub async fn write(&self, bytes: impl Into<Bytes>) -> Result<(), Closed> {
        let mut bytes = bytes.into();
        while !bytes.is_empty() {
            let room = self.0.room.notified();
            let mut room = std::pin::pin!(room);
            room.as_mut().enable();
            if self.lock().take(&mut bytes)? {
                self.0.news.notify_waiters();
            } else {
                room.await;
            }
        }
        Ok(())
    }

    /// No more follows: the command reads end of file.
    pub fn close(&self) {
        self.change(|state| state.closed = true);
    }

    /// A signal for the command, before whatever of its stdin is still to be sent: 2 is SIGINT.
    /// Of more than 64 that cannot be sent yet the last are left out.
    pub fn signal(&self, number: i32) {
        self.change(|state| {
            if state.urgent.len() < SIGNALS_MOST {
                state.urgent.push_back(Message::Signal(Signal { number }));
            }
        });
    }

    /// The terminal has another size.
    pub fn resize(&self, size: TerminalSize) {
        self.change(|state| {
            // Only the last one matters.
            state
                .urgent
                .retain(|message| !matches!(message, Message::Resize(_)));
            state.urgent.push_back(Message::Resize(size));
        });
    }

    /// The run is over.
    pub(crate) fn end(&self) {
        self.change(|state| state.over = true);
        self.0.room.notify_waiters();
    }

    /// Begins another call, in place of the one that broke; it is not known yet how much the
    /// run has, unless it is the first.
    pub(crate) fn next_call(&self) -> u64 {
        let mut call = 0;
        self.change(|state| {
            state.call += 1;
            call = state.call;
            if call > 1 {
                state.sent = None;
            }
            state.close_sent = false;
        });
        call
    }

    /// The run has so much, and the call goes on from there.
    ///
    /// # Errors
    /// [`Gone`]
    pub(crate) fn go_on(&self, accepted: &Accepted) -> Result<(), Gone> {
        let mut state = self.lock();
        let end = state.end;
        let has = match &mut state.origin {
            Origin::Run => accepted.files_offset.min(state.files) + accepted.stdin_offset,
            Origin::Attach(origin) => {
                let origin = *origin.get_or_insert(accepted.stdin_offset);
                // It has more if others send as well.
                accepted.stdin_offset.saturating_sub(origin).min(end)
            }
        };
        if state.sent.is_none() {
            let kept = state.begin;
            if has < kept {
                return Err(Gone { has, kept });
            }
            state.sent = Some(has);
        }
        drop(state);
        self.0.news.notify_waiters();
        Ok(())
    }

    /// What that call is to send next. Never returns once there is another call, or nothing
    /// left: the end of the messages would close the command's stdin.
    pub(crate) async fn next(&self, call: u64) -> RunInput {
        loop {
            let news = self.0.news.notified();
            let mut news = std::pin::pin!(news);
            news.as_mut().enable();
            if let Some(input) = self.lock().next(call) {
                self.0.room.notify_waiters();
                return RunInput { input: Some(input) };
            }
            news.await;
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.0.news.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        let state = &self.0.state;
        state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes some bytes; false if there is no room.
    fn take(&mut self, bytes: &mut Bytes) -> Result<bool, Closed> {
        if self.over || self.closed {
            return Err(Closed);
        }
        if self.end.saturating_sub(self.sent.unwrap_or(self.begin)) >= WAITING_MOST {
            return Ok(false);
        }
        let files_left = usize::try_from(self.files.saturating_sub(self.end)).unwrap_or(CHUNK);
        let most = if files_left > 0 {
            files_left.min(CHUNK)
        } else {
            CHUNK
        };
        let piece = bytes.split_to(most.min(bytes.len()));
        self.end += piece.len() as u64;
        self.log.push_back(piece);
        Ok(true)
    }

    fn next(&mut self, call: u64) -> Option<Message> {
        if call != self.call || self.over {
            return None;
        }
        if let Some(urgent) = self.urgent.pop_front() {
            return Some(urgent);
        }
        let sent = self.sent?;
        // More, if the run has had it from an earlier caller.
        if sent >= self.end {
            let close = self.closed && !self.close_sent;
            self.close_sent |= close;
            return close.then_some(Message::CloseStdin(CloseStdin {}));
        }
        let piece = self.piece_at(sent);
        let is_file = sent < self.files;
        let sent = sent + piece.len() as u64;
        self.sent = Some(sent);
        while let Some(first) = self.log.front()
            && self.begin + first.len() as u64 + KEPT <= sent
        {
            self.begin += first.len() as u64;
            self.log.pop_front();
        }
        Some(if is_file {
            Message::Files(piece)
        } else {
            Message::Stdin(piece)
        })
    }

    /// From there to the end of its piece.
    fn piece_at(&self, offset: u64) -> Bytes {
        let mut begin = self.begin;
        for piece in &self.log {
            let end = begin + piece.len() as u64;
            if offset < end {
                // Both are within a piece.
                let skip = usize::try_from(offset - begin).unwrap_or(0);
                return piece.slice(skip..);
            }
            begin = end;
        }
        Bytes::new()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    fn accepted(files_offset: u64, stdin_offset: u64) -> Accepted {
        Accepted {
            files_offset,
            stdin_offset,
            ..Accepted::default()
        }
    }

    /// All that a call would send now: bytes of files, bytes of stdin, other messages.
    fn drain(input: &Input, call: u64) -> (Vec<u8>, Vec<u8>, Vec<Message>) {
        let (mut files, mut stdin, mut others) = (Vec::new(), Vec::new(), Vec::new());
        while let Some(message) = input.next(call).now_or_never() {
            match message.input.unwrap() {
                Message::Files(bytes) => files.extend_from_slice(&bytes),
                Message::Stdin(bytes) => stdin.extend_from_slice(&bytes),
                other => others.push(other),
            }
        }
        (files, stdin, others)
    }

    fn write(input: &Input, bytes: Vec<u8>) -> Result<(), Closed> {
        input.write(bytes).now_or_never().expect("there is room")
    }

    proptest! {
        #[test]
        fn whatever_breaks_the_run_gets_every_byte_once(
            files in 0_usize..200_000,
            pieces in prop::collection::vec(0_usize..100_000, 0..8),
            taken in prop::collection::vec(0.0_f64..=1.0, 0..4),
        ) {
            let total = files + pieces.iter().sum::<usize>();
            let bytes: Vec<u8> = (0..total).map(|at| (at % 251).to_le_bytes()[0]).collect();
            let input = Input::of_run(files as u64, true);
            let (mut written, mut has) = (0, Vec::new());
            let mut call = input.next_call();
            let mut pieces = std::iter::once(files).chain(pieces);
            for part in taken {
                if let Some(piece) = pieces.next() {
                    write(&input, bytes[written..written + piece].to_vec()).unwrap();
                    written += piece;
                }
                let (sent_files, sent_stdin, _) = drain(&input, call);
                let sent = [sent_files, sent_stdin].concat();
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss,
                    clippy::cast_precision_loss, reason = "some part of it")]
                let arrives = (sent.len() as f64 * part) as usize;
                has.extend_from_slice(&sent[..arrives]);
                call = input.next_call();
                prop_assert!(drain(&input, call).0.is_empty(), "nothing before it is accepted");
                let of_files = has.len().min(files);
                let accepted = accepted(of_files as u64, (has.len() - of_files) as u64);
                input.go_on(&accepted).unwrap();
            }
            for piece in pieces {
                write(&input, bytes[written..written + piece].to_vec()).unwrap();
                written += piece;
                let (sent_files, sent_stdin, _) = drain(&input, call);
                has.extend(sent_files);
                has.extend(sent_stdin);
            }
            input.close();
            let (sent_files, sent_stdin, others) = drain(&input, call);
            has.extend(sent_files);
            has.extend(sent_stdin);
            prop_assert!(has == bytes);
            prop_assert_eq!(others.len(), 1);
            prop_assert_eq!(write(&input, vec![0]), Err(Closed));
        }
    }

    #[test]
    fn a_run_that_others_wrote_to_gets_what_is_new() {
        let input = Input::of_attach();
        write(&input, b"more".to_vec()).unwrap();
        let call = input.next_call();
        assert!(drain(&input, call).1.is_empty());
        input.go_on(&accepted(3, 100)).unwrap();
        assert_eq!(drain(&input, call).1, b"more");
        let call = input.next_call();
        input.go_on(&accepted(3, 102)).unwrap();
        assert_eq!(drain(&input, call).1, b"re");
    }

    #[test]
    fn a_run_that_had_some_of_it_from_an_earlier_process_gets_the_rest() {
        let input = Input::of_run(0, false);
        let call = input.next_call();
        write(&input, b"ab".to_vec()).unwrap();
        input.go_on(&accepted(0, 3)).unwrap();
        assert!(drain(&input, call).1.is_empty());
        write(&input, b"cdef".to_vec()).unwrap();
        assert_eq!(drain(&input, call).1, b"def");
    }

    #[test]
    fn input_that_was_let_go_is_missed_and_not_skipped() {
        let input = Input::of_run(0, true);
        let mut call = input.next_call();
        for _ in 0..=KEPT / WAITING_MOST {
            write(&input, vec![0; 1 << 20]).unwrap();
            drain(&input, call);
        }
        call = input.next_call();
        assert!(input.go_on(&accepted(0, 10)).is_err());
        input.go_on(&accepted(0, KEPT)).unwrap();
        assert_eq!(drain(&input, call).1.len(), 1 << 20);
    }

    #[test]
    fn whoever_writes_more_than_is_sent_waits() {
        let input = Input::of_run(0, true);
        let call = input.next_call();
        write(&input, vec![0; 1 << 20]).unwrap();
        assert!(input.write(vec![0; 1]).now_or_never().is_none());
        drain(&input, call);
        assert!(input.write(vec![0; 1]).now_or_never().is_some());
        input.end();
        assert_eq!(write(&input, vec![0]), Err(Closed));
    }
}
