//! The frames of one direction of a WebSocket (RFC 6455, section 5.2), as they pass in pieces.

use std::io::{self, Cursor};

use bytes::{Buf, BytesMut};
use tungstenite::protocol::frame::{
    FrameHeader,
    coding::{Data, OpCode},
};

/// Longest header of a frame.
const MAX_HEADER: usize = 14;

/// Where in a message the reader is.
#[derive(Debug, Default)]
pub struct Frames {
    /// The beginning of a header.
    header: BytesMut,
    /// How much of the current frame is to come.
    left: u64,
    /// Whether the current message is text.
    is_text: bool,
    /// Whether the current frame is the last of its message.
    is_last: bool,
    /// Whether the current frame is a ping or the like, which may come within a message.
    is_control: bool,
}

/// What a piece has.
#[derive(Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// A message begins.
    Begin,
    /// Of a text message, as it was sent: a client's is masked.
    Text(&'a [u8]),
    /// A text message ends.
    End,
}

/// The peer does not speak the protocol.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("these are no frames of a WebSocket")]
pub struct NoFrames;

impl From<NoFrames> for io::Error {
    fn from(error: NoFrames) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

impl Frames {
    /// Reads the next piece; `see` gets what is in it, in order, and may stop the reader.
    ///
    /// # Errors
    /// [`NoFrames`], and the error of `see`. There is no next piece then.
    pub fn read<E: From<NoFrames>>(
        &mut self,
        mut piece: &[u8],
        mut see: impl FnMut(Part) -> Result<(), E>,
    ) -> Result<(), E> {
        while !piece.is_empty() {
            if self.left == 0 {
                let Some(opcode) = self.begin(&mut piece)? else {
                    continue;
                };
                if let OpCode::Data(data @ (Data::Text | Data::Binary)) = opcode {
                    self.is_text = data == Data::Text;
                    see(Part::Begin)?;
                }
                self.is_control = matches!(opcode, OpCode::Control(_));
            } else {
                let left = usize::try_from(self.left).unwrap_or(usize::MAX);
                let (payload, rest) = piece.split_at(left.min(piece.len()));
                if self.is_text && !self.is_control {
                    see(Part::Text(payload))?;
                }
                self.left -= payload.len() as u64;
                piece = rest;
            }
            if self.left == 0 && self.is_text && self.is_last && !self.is_control {
                see(Part::End)?;
            }
        }
        Ok(())
    }

    /// Reads a frame's header, as far as it has come. Returns what the frame is, once it is known.
    fn begin(&mut self, piece: &mut &[u8]) -> Result<Option<OpCode>, NoFrames> {
        let known = self.header.len();
        let most = piece.len().min(MAX_HEADER - known);
        self.header.extend_from_slice(&piece[..most]);
        let mut header = Cursor::new(&self.header);
        match FrameHeader::parse(&mut header) {
            Ok(Some((frame, length))) => {
                let read = usize::try_from(header.position()).unwrap_or(MAX_HEADER);
                piece.advance(read.saturating_sub(known));
                self.header.clear();
                self.left = length;
                self.is_last = frame.is_final;
                Ok(Some(frame.opcode))
            }
            Ok(None) => {
                piece.advance(most);
                Ok(None)
            }
            Err(_) => Err(NoFrames),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is seen in the bytes, cut at these lengths; text is joined.
    fn parts(bytes: &[u8], cuts: &[usize]) -> Result<Vec<String>, NoFrames> {
        let mut frames = Frames::default();
        let mut seen: Vec<String> = Vec::new();
        let mut rest = bytes;
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let cut = cuts.next().map_or(rest.len(), |cut| (*cut).min(rest.len()));
            let (piece, after) = rest.split_at(cut.max(1));
            frames.read(piece, |part| {
                match part {
                    Part::Begin => seen.push("begin ".into()),
                    Part::Text(text) => match seen.last_mut() {
                        Some(last) => last.push_str(&String::from_utf8_lossy(text)),
                        None => seen.push(String::from_utf8_lossy(text).into()),
                    },
                    Part::End => seen.push("end ".into()),
                }
                Ok::<_, NoFrames>(())
            })?;
            rest = after;
        }
        Ok(seen)
    }

    #[test]
    fn a_ping_within_a_message_changes_nothing() {
        let bytes = [
            &[0x01, 2][..],
            b"ab",
            &[0x89, 1],
            b"x",
            &[0x80, 1],
            b"c",
            &[0x82, 1],
            b"d",
            &[0x81, 0],
        ];
        let seen = parts(&bytes.concat(), &[]).unwrap();
        assert_eq!(seen, ["begin abc", "end ", "begin ", "begin ", "end "]);
        assert_eq!(parts(b"one", &[]), Err(NoFrames));
    }

    proptest! {
        #[test]
        fn the_pieces_do_not_matter(
            texts in prop::collection::vec(("[a-z]{0,200}", any::<bool>()), 0..5),
            cuts in prop::collection::vec(1..40_usize, 1..4),
        ) {
            let mut bytes = Vec::new();
            for (text, is_ping) in &texts {
                bytes.push(if *is_ping { 0x89 } else { 0x81 });
                match u8::try_from(text.len()).unwrap() {
                    length @ ..126 => bytes.push(length),
                    length => bytes.extend([126, 0, length]),
                }
                bytes.extend(text.as_bytes());
            }
            prop_assert_eq!(parts(&bytes, &cuts), parts(&bytes, &[]));
        }

        #[test]
        fn no_bytes_break_the_reader(bytes: Vec<u8>, cuts in prop::collection::vec(1..9_usize, 1..4)) {
            let _refused = parts(&bytes, &cuts).is_err();
        }
    }
}
