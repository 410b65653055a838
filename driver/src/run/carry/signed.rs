//! The input that an execution token is for: it passes only if it is the one that was signed.

use polydev_proto::execution::SignedInput;
use sha2::{Digest, Sha256};

use crate::run::Run;

/// What has passed of it.
#[derive(Debug)]
pub(super) struct Signed {
    input: SignedInput,
    /// Of the bytes before `at`.
    hash: Sha256,
    at: u64,
}

/// Input that was not signed, or cannot be checked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unsigned {
    #[error("its input is not the one that its execution token is for")]
    Other,
    #[error(
        "its input came while the driver was started again, and so cannot be compared with its \
         execution token; run it again"
    )]
    Unseen,
}

impl Signed {
    /// `None` if the run has no token, or came without input.
    pub(super) fn of(run: &Run) -> Option<Self> {
        let input = run.claimed.token.as_ref()?.input.clone()?;
        Some(Self {
            at: input.from,
            input,
            hash: Sha256::new(),
        })
    }

    /// Where in the run's input it ends.
    pub(super) fn end(&self) -> u64 {
        self.input.from.saturating_add(self.input.bytes)
    }

    /// Checks the next bytes of the run's input, before they are passed on. The last ones that are
    /// signed pass only if all are right.
    pub(super) fn pass(&mut self, offset: u64, data: &[u8], closes: bool) -> Result<(), Unsigned> {
        let end = self.end();
        // All have passed, if not in this life of the driver, then in an earlier one.
        let has_passed = self.at >= end || (self.at == self.input.from && offset >= end);
        if has_passed {
            return Ok(());
        }
        if offset > self.at {
            return Err(Unsigned::Unseen);
        }
        let data_end = offset + data.len() as u64;
        if self.at < end && data_end > self.at {
            let from = usize::try_from(self.at - offset).unwrap_or(data.len());
            let to = usize::try_from(end.min(data_end) - offset).unwrap_or(data.len());
            self.hash.update(&data[from..to]);
            self.at = end.min(data_end);
            if self.at == end && hex::encode(self.hash.clone().finalize()) != self.input.sha256 {
                return Err(Unsigned::Other);
            }
        }
        match closes && self.at < end {
            true => Err(Unsigned::Other),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn signed(from: u64, text: &[u8]) -> Signed {
        Signed {
            input: SignedInput {
                from,
                bytes: text.len() as u64,
                sha256: hex::encode(Sha256::digest(text)),
            },
            hash: Sha256::new(),
            at: from,
        }
    }

    proptest! {
        /// However the input is cut into pieces, and wherever what is signed is in it.
        #[test]
        fn input_passes_if_what_is_signed_of_it_is_right(
            before in prop::collection::vec(any::<u8>(), 0..20),
            text in prop::collection::vec(any::<u8>(), 1..40),
            after in prop::collection::vec(any::<u8>(), 0..20),
            pieces in prop::collection::vec(1usize..9, 1..90),
            changed in prop::option::of((any::<prop::sample::Index>(), 1u8..)),
        ) {
            let mut signed = signed(before.len() as u64, &text);
            let (from, to) = (before.len(), before.len() + text.len());
            let mut input = [before, text, after].concat();
            if let Some((at, flip)) = changed {
                let at = at.index(input.len());
                input[at] ^= flip;
            }
            let is_right = changed.is_none_or(|(at, _)| !(from..to).contains(&at.index(input.len())));
            let (mut offset, mut passed) = (0, Ok(()));
            for piece in pieces.into_iter().chain([input.len()]) {
                let end = input.len().min(offset + piece);
                passed = signed.pass(offset as u64, &input[offset..end], false);
                if passed.is_err() {
                    break;
                }
                offset = end;
            }
            let closed = passed.and_then(|()| signed.pass(offset as u64, &[], true));
            prop_assert_eq!(closed.is_ok(), is_right);
            // The last byte that is signed has not passed.
            prop_assert!(is_right || offset < to);
        }
    }

    #[test]
    fn input_that_ends_too_early_or_was_not_seen_is_refused() {
        let mut one = signed(0, b"hello");
        assert_eq!(one.pass(0, b"hel", false), Ok(()));
        assert_eq!(one.pass(3, b"", true), Err(Unsigned::Other));
        // A driver that was started again: what came before has passed, or is not known.
        assert_eq!(signed(0, b"hello").pass(5, b"more", true), Ok(()));
        assert_eq!(
            signed(0, b"hello").pass(3, b"lo", false),
            Err(Unsigned::Unseen)
        );
        assert_eq!(signed(5, b"hello").pass(5, b"hello", true), Ok(()));
    }
}
