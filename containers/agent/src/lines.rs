//! The lines of a CLI, and of a caller.

use std::fmt;

use bytes::{Bytes, BytesMut};

/// Longest line of a CLI, in bytes: a result of a tool can be a picture.
pub const MAX_LINE: usize = 16 << 20;

/// A line has more bytes than are allowed.
#[derive(Debug, PartialEq, Eq)]
pub struct TooLong {
    max: usize,
}

impl fmt::Display for TooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a line has more than {} MiB", self.max >> 20)
    }
}

/// Cuts bytes into lines.
#[derive(Debug)]
pub struct Lines {
    /// Longest line, in bytes.
    max: usize,
    waiting: BytesMut,
    /// How many of the waiting bytes are known to have no end of a line.
    seen: usize,
}

impl Default for Lines {
    /// Those of a CLI.
    fn default() -> Self {
        Self::of(MAX_LINE)
    }
}

impl Lines {
    /// Lines of at most so many bytes.
    #[must_use]
    pub fn of(max: usize) -> Self {
        Self {
            max,
            waiting: BytesMut::new(),
            seen: 0,
        }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.waiting.extend_from_slice(bytes);
    }

    /// The next whole line, without its end.
    ///
    /// # Errors
    /// [`TooLong`]
    pub fn next_line(&mut self) -> Result<Option<Bytes>, TooLong> {
        match memchr::memchr(b'\n', &self.waiting[self.seen..]) {
            Some(at) if self.seen + at <= self.max => {
                let mut line = self.waiting.split_to(self.seen + at + 1);
                line.truncate(self.seen + at);
                self.seen = 0;
                Ok(Some(line.freeze()))
            }
            None if self.waiting.len() <= self.max => {
                self.seen = self.waiting.len();
                Ok(None)
            }
            Some(_) | None => Err(TooLong { max: self.max }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn lines_are_the_same_however_they_arrive(
            text in "[a\n]{0,60}",
            cuts in prop::collection::vec(0usize..8, 0..80),
        ) {
            let (mut lines, mut rest, mut read) = (Lines::default(), text.as_bytes(), Vec::new());
            for cut in cuts.into_iter().chain([text.len()]) {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                lines.push(now);
                rest = later;
                while let Some(line) = lines.next_line().unwrap() {
                    read.push(line);
                }
            }
            let (whole, _) = text.rsplit_once('\n').unwrap_or_default();
            let expected: Vec<&str> = match text.contains('\n') {
                true => whole.split('\n').collect(),
                false => Vec::new(),
            };
            prop_assert_eq!(read, expected);
        }
    }

    #[test]
    fn a_line_without_an_end_is_not_kept_forever() {
        let mut lines = Lines::default();
        lines.push(&vec![b'x'; MAX_LINE]);
        assert_eq!(lines.next_line(), Ok(None));
        lines.push(b"x");
        assert!(lines.next_line().is_err());
    }
}
