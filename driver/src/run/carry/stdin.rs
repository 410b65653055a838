//! The caller's files and stdin. The driver keeps them until init reports that they were
//! taken, in case init's connection breaks.

use std::collections::VecDeque;

use bytes::Bytes;
use polydev_proto::init::{Stdin, to_init};

use super::{Carrier, Stop};
use crate::run::Input;

/// The driver sends the next input only while fewer bytes than this are in flight to the
/// command. So one message more may be in flight. Init holds up to twice this number.
const STDIN_WINDOW: u64 = 128 << 10;

/// The part of stdin that init has not yet reported as taken.
#[derive(Default)]
pub(super) struct StdinWindow {
    pub(super) sent: u64,
    taken: u64,
    closed: bool,
    pub(super) kept: VecDeque<Stdin>,
}

impl StdinWindow {
    pub(super) fn is_open(&self) -> bool {
        self.sent - self.taken < STDIN_WINDOW
    }
}

impl Carrier<'_> {
    /// Forwards input that the command does not have yet.
    pub(super) async fn on_input(&mut self, input: Input) -> Result<(), Stop> {
        let (data, close) = match input {
            Input::Signal(number) => return self.signal(number).await,
            Input::Resize(size) => {
                self.terminal = Some(size);
                return self.send(to_init::Message::Resize(size)).await;
            }
            Input::Stdin { offset, data } if self.stdin.closed => {
                // Nobody reads it: report it as taken, so that the caller continues.
                let end = offset + data.len() as u64;
                self.stdin.sent = self.stdin.sent.max(end);
                self.taken(end, true);
                return Ok(());
            }
            Input::Stdin { offset, data } => {
                // Skip what the shim resends and the driver already has.
                let known = usize::try_from(self.stdin.sent.saturating_sub(offset));
                let new = known.ok().filter(|known| *known < data.len());
                match new {
                    Some(known) if offset <= self.stdin.sent => (data.slice(known..), false),
                    _ => return Ok(()),
                }
            }
            Input::CloseStdin => (Bytes::new(), true),
        };
        if self.stdin.closed {
            return Ok(());
        }
        let offset = self.stdin.sent;
        if let Some(signed) = &mut self.signed
            && let Err(unsigned) = signed.pass(offset, &data, close)
        {
            return Err(self.not_signed(&unsigned));
        }
        self.stdin.closed = close;
        self.stdin.sent += data.len() as u64;
        let stdin = Stdin {
            offset,
            data,
            close,
        };
        self.stdin.kept.push_back(stdin.clone());
        self.send(to_init::Message::Stdin(stdin)).await
    }

    /// Init reports how much the command has taken.
    pub(super) fn taken(&mut self, offset: u64, closed: bool) {
        let stdin = &mut self.stdin;
        stdin.taken = stdin.taken.max(offset);
        stdin.closed |= closed;
        let taken = stdin.taken;
        stdin
            .kept
            .retain(|kept| kept.close || kept.offset + kept.data.len() as u64 > taken);
        if taken > self.run.progress.borrow().stdin_taken {
            self.run.update(|progress| progress.stdin_taken = taken);
        }
    }
}
