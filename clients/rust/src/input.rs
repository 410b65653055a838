//! The input that a caller sends to a run. It is kept until no broken connection can lose it.

use std::{collections::VecDeque, sync::Arc};

use bytes::{Bytes, BytesMut};
use parking_lot::{Mutex, MutexGuard};
use polydev_proto::runtime::{
    Accepted, CloseStdin, RunInput, Signal, TerminalSize, run_input::Input as Message,
};
use serde_json::json;
use tokio::sync::Notify;

/// The largest number of bytes in one message of the API.
const MAX_CHUNK: usize = 64 << 10;
/// Unsent bytes. A writer waits while there are more.
const MAX_WAITING: u64 = 1 << 20;
/// Bytes that are kept after they were sent. This is more than the path from the caller to the
/// command can hold with all its windows full.
const MAX_KEPT: u64 = 8 << 20;
/// Unsent signals; further ones are dropped.
const MAX_SIGNALS: usize = 64;

/// The input of a run, from its caller; clones share it.
#[derive(Debug, Clone)]
pub struct Input(Arc<Shared>);

/// The run accepts no more input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the run takes no more input")]
pub struct Closed;

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Notified when there is something to send, or a new call.
    news: Notify,
    room: Notify,
}

/// One stream of bytes: the run's files, and then its stdin.
#[derive(Debug)]
struct State {
    /// How many of the bytes belong to files.
    files: u64,
    origin: Origin,
    /// The last bytes that were sent, in pieces of at most `MAX_CHUNK`. No piece has bytes of both
    /// files and stdin.
    kept: VecDeque<BytesMut>,
    /// The offset at which `kept` begins.
    begin: u64,
    /// The offset at which `kept` ends and `waiting` begins.
    sent: u64,
    /// The unsent bytes.
    waiting: VecDeque<Bytes>,
    end: u64,
    /// How many bytes more than were written here the run has, from an earlier caller.
    skip: u64,
    /// Whether it is known how much input the run has. If so, waiting bytes may be sent.
    known: bool,
    call: u64,
    /// No more input follows.
    closed: bool,
    close_sent: bool,
    /// Messages that are sent before any bytes.
    urgent: VecDeque<Message>,
    /// The last terminal size. The next call sends it again.
    size: Option<TerminalSize>,
    over: bool,
}

/// Where the caller's input begins.
#[derive(Debug, Clone, Copy)]
enum Origin {
    /// At the run's start: all of its input comes from this caller.
    Run,
    /// At the offset that the run has reported; `None` until it has. Others have sent the input
    /// before this offset, and may send more.
    Attach(Option<u64>),
}

/// A broken connection has lost bytes that are no longer kept.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the run has {has} bytes of its input, and those from {kept} on are kept")]
pub(crate) struct Gone {
    has: u64,
    kept: u64,
}

impl Input {
    /// The input of a run whose files have `files` bytes. `is_new` says that none of the input was
    /// ever sent.
    pub(crate) fn of_run(files: u64, is_new: bool) -> Self {
        Self::new(files, Origin::Run, is_new)
    }

    /// The input of a run that exists already.
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

    /// Writes input: the bytes of the files that have their `size` in the start message, one file
    /// after the other, and then the command's stdin. Waits while more than 1 MiB is unsent. Input
    /// is sent only while the caller reads the run's events, so write more than 1 MiB concurrently
    /// with reading.
    ///
    /// # Errors
    /// [`Closed`] when the run has ended or its stdin is closed.
    ///
    /// # Cancel safety
    /// Some of the bytes may have been accepted.
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

    /// Closes the input: the command reads end of file.
    pub fn close(&self) {
        self.change(|state| state.closed = true);
    }

    /// Writes the next prompt of a conversation to its stdin. An empty model is that of the prompt
    /// before. Write one line at a time: those of two tasks would be mixed.
    ///
    /// # Errors
    /// As with [`write`](Self::write).
    ///
    /// # Cancel safety
    /// A part of the prompt may have been accepted: write nothing more.
    pub async fn prompt(&self, text: &str, model: &str) -> Result<(), Closed> {
        let prompt = json!({ "prompt": { "text": text, "model": model } });
        self.write(format!("{prompt}\n")).await
    }

    /// Ends the answer to the prompt before.
    ///
    /// # Errors
    /// As with [`write`](Self::write).
    pub async fn cancel_turn(&self) -> Result<(), Closed> {
        self.write("{\"cancel_turn\":{}}\n").await
    }

    /// Sends a signal to the command, such as 2 (SIGINT), before any unsent stdin. At most 64
    /// signals wait to be sent; further ones are dropped.
    pub fn signal(&self, number: i32) {
        self.change(|state| {
            if state.urgent.len() < MAX_SIGNALS {
                state.urgent.push_back(Message::Signal(Signal { number }));
            }
        });
    }

    /// Sets the size of the terminal.
    pub fn resize(&self, size: TerminalSize) {
        self.change(|state| state.resize(size));
    }

    /// Ends the input, because the run has ended.
    pub(crate) fn end(&self) {
        self.change(|state| state.over = true);
        self.0.room.notify_waiters();
    }

    /// Begins a new call in place of the call that broke, and returns its number. Except for the
    /// first call, it is not known yet how much input the run has.
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

    /// Continues the call after the input that the run has according to `accepted`.
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
                // The run has more if others send input as well.
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

    /// The next message of the given call; `None` when a new call has begun or the run has ended.
    /// In all other cases it waits, because the end of the messages would close the command's
    /// stdin.
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
        self.0.state.lock()
    }
}

impl Shared {
    fn tell(&self) {
        self.news.notify_waiters();
        self.room.notify_waiters();
    }
}

impl State {
    /// Accepts some bytes; false if there is no room.
    fn take(&mut self, bytes: &mut Bytes) -> Result<bool, Closed> {
        if self.over || self.closed {
            return Err(Closed);
        }
        if self.end - self.sent >= MAX_WAITING {
            return Ok(false);
        }
        let files_left = usize::try_from(self.files.saturating_sub(self.end)).unwrap_or(MAX_CHUNK);
        let most = if files_left > 0 {
            files_left.min(MAX_CHUNK)
        } else {
            MAX_CHUNK
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
        // Only the last size matters.
        self.urgent
            .retain(|message| !matches!(message, Message::Resize(_)));
        self.urgent.push_back(Message::Resize(size));
    }

    /// Continues after the first `has` bytes: kept bytes after them wait to be sent again.
    fn seek(&mut self, has: u64) -> Result<(), Gone> {
        let kept = self.begin;
        if has < kept {
            return Err(Gone { has, kept });
        }
        while has < self.sent
            && let Some(mut piece) = self.kept.pop_back()
        {
            let begin = self.sent - piece.len() as u64;
            // Both offsets are within the piece.
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

    /// Skips waiting bytes that the run has already.
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
            // Many small pieces would need more memory than their bytes.
            Some(last) if last.len() + piece.len() <= MAX_CHUNK && !is_first_of_stdin => {
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
