//! One output stream of the command: what was read from its pipe but not yet acknowledged,
//! in a bounded buffer with offsets. Pure.

use std::collections::VecDeque;

use bytes::Bytes;

/// The unacknowledged part of a stream. Offsets count from the command's start.
///
/// ```text
/// 0 ......... base ............ sent ............ end
///   acknowledged   sent, kept       still to send
/// ```
#[derive(Debug, Default)]
pub(crate) struct Output {
    kept: VecDeque<u8>,
    /// Offset of the first kept byte.
    base: u64,
    /// Offset of the first byte that was not sent on this connection.
    sent: u64,
    capacity: usize,
}

impl Output {
    /// Holds at most `capacity` bytes, allocated as needed.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            ..Self::default()
        }
    }

    /// How many bytes may be read from the pipe now.
    pub(crate) fn room(&self) -> usize {
        self.capacity.saturating_sub(self.kept.len())
    }

    /// Length of the stream so far.
    pub(crate) fn end(&self) -> u64 {
        self.base + self.kept.len() as u64
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() <= self.room());
        self.kept.extend(bytes);
    }

    /// The next bytes to send, at most `max`, with the offset of the first one.
    pub(crate) fn take_unsent(&mut self, max: usize) -> Option<(u64, Bytes)> {
        let offset = self.sent;
        let start = usize::try_from(offset - self.base).ok()?;
        let len = max.min(self.kept.len() - start);
        if len == 0 {
            return None;
        }
        let mut data = Vec::with_capacity(len);
        let (front, back) = self.kept.as_slices();
        let front = front.get(start..).unwrap_or_default();
        data.extend_from_slice(&front[..len.min(front.len())]);
        let start = start.saturating_sub(self.kept.len() - back.len());
        data.extend_from_slice(&back[start..][..len - data.len()]);
        self.sent += len as u64;
        Some((offset, data.into()))
    }

    pub(crate) fn is_sent(&self) -> bool {
        self.sent == self.end()
    }

    /// The driver has everything below `offset`; an offset that was never sent is clamped.
    pub(crate) fn acknowledge(&mut self, offset: u64) {
        let offset = offset.min(self.sent);
        if let Ok(count) = usize::try_from(offset.saturating_sub(self.base)) {
            self.kept.drain(..count);
            self.base += count as u64;
        }
        if self.kept.is_empty() {
            // Frees the memory of a command that has become quiet.
            self.kept = VecDeque::new();
        }
    }

    /// Resends on a new connection what was not acknowledged.
    pub(crate) fn rewind(&mut self) {
        self.sent = self.base;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Write(Vec<u8>),
        Send(usize),
        Acknowledge(u64),
        Reconnect,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40).prop_map(Step::Write),
            (1usize..30).prop_map(Step::Send),
            (0u64..200).prop_map(Step::Acknowledge),
            Just(Step::Reconnect),
        ]
    }

    proptest! {
        /// A receiver that appends only what continues its copy gets exactly what was
        /// written, whatever is cut, repeated or acknowledged on the way.
        #[test]
        fn every_byte_arrives_once_and_in_order(steps in prop::collection::vec(step(), 0..100)) {
            let mut output = Output::new(64);
            let (mut written, mut received) = (Vec::new(), Vec::new());
            let mut deliver = |output: &mut Output, max| {
                let Some((offset, data)) = output.take_unsent(max) else { return false };
                let offset = usize::try_from(offset).unwrap();
                assert!(offset <= received.len(), "a gap");
                let known = received.len() - offset;
                received.extend_from_slice(data.get(known..).unwrap_or_default());
                true
            };
            for step in steps {
                match step {
                    Step::Write(mut bytes) => {
                        bytes.truncate(output.room());
                        output.push(&bytes);
                        written.extend_from_slice(&bytes);
                    }
                    Step::Send(max) => { deliver(&mut output, max); }
                    Step::Acknowledge(offset) => output.acknowledge(offset),
                    Step::Reconnect => output.rewind(),
                }
                prop_assert!(output.kept.len() <= 64);
            }
            while deliver(&mut output, 7) {}
            prop_assert!(output.is_sent());
            prop_assert_eq!(output.end(), written.len() as u64);
            prop_assert_eq!(received, written);
        }
    }
}
