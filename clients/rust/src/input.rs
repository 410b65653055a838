//! What a caller sends to a run: kept until no broken connection can lose it any more.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::{Bytes, BytesMut};
use polydev_proto::runtime::{
    Accepted, CloseStdin, RunInput, Signal, TerminalSize, run_input::Input as Message,
};
use tokio::sync::Notify;

/// The most the API takes in one message.
const CHUNK: usize = 64 << 10;
/// Bytes that wait to be sent before whoever writes more has to wait.
const MAX_WAITING: u64 = 1 << 20;
/// Bytes that are kept after they were sent: more than lie between caller and command, with
/// all windows on the way full.
const MAX_KEPT: u64 = 8 << 20;
/// Signals that wait to be sent; further ones are left out.
const MAX_SIGNALS: usize = 64;

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
    origin: Origin,
    /// The last of what was sent, in pieces of at most `CHUNK`, none with bytes of files and of
    /// stdin.
    kept: VecDeque<BytesMut>,
    /// Where `kept` begins.
    begin: u64,
    /// Where it ends, and `waiting` begins.
    sent: u64,
    /// What is to be sent.
    waiting: VecDeque<Bytes>,
    end: u64,
    /// The run has so much more than was written here, from an earlier caller.
    skip: u64,
    /// It is known how much the run has, so that what waits may be sent.
    known: bool,
    call: u64,
    /// Nothing follows.
    closed: bool,
    close_sent: bool,
    /// What goes before any bytes.
    urgent: VecDeque<Message>,
    /// The last that was told, for the next call to tell again.
    size: Option<TerminalSize>,
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
        Self::new(files, Origin::Run, is_new)
    }

    /// Of a run that goes on already.
    pub(crate) fn of_attach() -> Self {
        Self::new(0, Origin::Attach(None), false)
    }

    fn new(files: u64, origin: Origin, known: bool) -> Self {
        let state = State {
            files,
            origin,
            kept: VecDeque::new(),
            begin: 0,
            sent: 0,
            waiting: VecDeque::new(),
            end: 0,
            skip: 0,
            known,
            call: 0,
            closed: false,
            close_sent: false,
            urgent: VecDeque::new(),
            size: None,
            over: false,
        };
        Self(Arc::new(Shared {
            state: state.into(),
            news: Notify::new(),
            room: Notify::new(),
        }))
    }

    /// The bytes of the files whose `size` the run was told, one file's after the other's, and
    /// then the command's stdin. Waits while more than 1 MiB has not been sent, which happens as
    /// long as somebody asks for the run's events: more is to be written beside that.
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
            if state.urgent.len() < MAX_SIGNALS {
                state.urgent.push_back(Message::Signal(Signal { number }));
            }
        });
    }

    /// The terminal has another size.
    pub fn resize(&self, size: TerminalSize) {
        self.change(|state| state.resize(size));
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
                state.known = false;
                if let Some(size) = state.size {
                    state.resize(size);
                }
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
        if !state.known {
            state.seek(has)?;
        }
        drop(state);
        self.0.tell();
        Ok(())
    }

    /// What that call is to send next; `None` once there is another call or the run is over.
    /// Otherwise it waits: the end of the messages would close the command's stdin.
    pub(crate) async fn next(&self, call: u64) -> Option<RunInput> {
        loop {
            let news = self.0.news.notified();
            let mut news = std::pin::pin!(news);
            news.as_mut().enable();
            {
                let mut state = self.lock();
                if call != state.call || state.over {
                    return None;
                }
                if let Some(input) = state.next() {
                    drop(state);
                    self.0.room.notify_waiters();
                    return Some(RunInput { input: Some(input) });
                }
            }
            news.await;
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.0.tell();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        let state = &self.0.state;
        state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn tell(&self) {
        self.news.notify_waiters();
        self.room.notify_waiters();
    }
}

impl State {
    /// Takes some bytes; false if there is no room.
    fn take(&mut self, bytes: &mut Bytes) -> Result<bool, Closed> {
        if self.over || self.closed {
            return Err(Closed);
        }
        if self.end - self.sent >= MAX_WAITING {
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
        self.waiting.push_back(piece);
        if self.skip > 0 {
            let has = self.sent + self.skip;
            self.pass(has);
        }
        Ok(true)
    }

    fn resize(&mut self, size: TerminalSize) {
        self.size = Some(size);
        // Only the last one matters.
        self.urgent
            .retain(|message| !matches!(message, Message::Resize(_)));
        self.urgent.push_back(Message::Resize(size));
    }

    /// The run has so much: what follows waits to be sent.
    fn seek(&mut self, has: u64) -> Result<(), Gone> {
        let kept = self.begin;
        if has < kept {
            return Err(Gone { has, kept });
        }
        while has < self.sent
            && let Some(mut piece) = self.kept.pop_back()
        {
            let begin = self.sent - piece.len() as u64;
            // Both are within the piece.
            let had = usize::try_from(has.saturating_sub(begin)).unwrap_or(0);
            if had > 0 {
                self.kept.push_back(piece.split_to(had));
            }
            self.sent = begin.max(has);
            self.waiting.push_front(piece.freeze());
        }
        self.pass(has);
        self.known = true;
        Ok(())
    }

    /// What the run has of what waits need not be sent.
    fn pass(&mut self, has: u64) {
        while self.sent < has
            && let Some(mut piece) = self.waiting.pop_front()
        {
            let passed = usize::try_from(has - self.sent).unwrap_or(usize::MAX);
            let passed = piece.split_to(passed.min(piece.len()));
            if !piece.is_empty() {
                self.waiting.push_front(piece);
            }
            self.keep(&passed);
        }
        self.skip = has.saturating_sub(self.sent);
    }

    fn keep(&mut self, piece: &[u8]) {
        let is_first_of_stdin = self.sent == self.files;
        self.sent += piece.len() as u64;
        match self.kept.back_mut() {
            // Many small ones would take more than their bytes.
            Some(last) if last.len() + piece.len() <= CHUNK && !is_first_of_stdin => {
                last.extend_from_slice(piece);
            }
            _ => self.kept.push_back(BytesMut::from(piece)),
        }
        while let Some(first) = self.kept.front()
            && self.begin + first.len() as u64 + MAX_KEPT <= self.sent
        {
            self.begin += first.len() as u64;
            self.kept.pop_front();
        }
    }

    fn next(&mut self) -> Option<Message> {
        if let Some(urgent) = self.urgent.pop_front() {
            return Some(urgent);
        }
        if !self.known {
            return None;
        }
        let Some(piece) = self.waiting.pop_front() else {
            let close = self.closed && !self.close_sent;
            self.close_sent |= close;
            return close.then_some(Message::CloseStdin(CloseStdin {}));
        };
        let is_file = self.sent < self.files;
        self.keep(&piece);
        Some(if is_file {
            Message::Files(piece)
        } else {
            Message::Stdin(piece)
        })
    }
}

#[cfg(test)]
mod tests;
