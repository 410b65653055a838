//! Frames of `polydev.init.v1`: a 4-byte big-endian length and one message.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

/// Longest message, in bytes. The largest one is a [`Start`](crate::init::Start), with
/// credential files and up to 2 MiB of argv and environment. Output is sent in pieces of at
/// most [`MAX_DATA`].
pub const MAX_FRAME: usize = 4 << 20;

/// Most bytes of a stream in one `Data` or `Stdin` frame.
pub const MAX_DATA: usize = 64 << 10;

/// Why bytes from the other side are not a frame. The connection is then unusable.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the frame has {len} bytes; at most {MAX_FRAME} are allowed")]
    TooLong { len: usize },
    #[error("the frame does not contain the expected message")]
    Malformed(#[source] prost::DecodeError),
}

/// Appends `message` as one frame.
///
/// # Errors
/// [`Error::TooLong`] if the message exceeds [`MAX_FRAME`]; nothing is appended.
pub fn encode(message: &impl Message, out: &mut BytesMut) -> Result<(), Error> {
    let len = message.encoded_len();
    match u32::try_from(len) {
        Ok(prefix) if len <= MAX_FRAME => {
            out.reserve(4 + len);
            out.put_u32(prefix);
            message.encode_raw(out);
            Ok(())
        }
        _ => Err(Error::TooLong { len }),
    }
}

/// Removes the first frame from `input`; leaves `input` unchanged if the frame is
/// incomplete.
///
/// # Errors
/// [`Error`] if the other side breaks the protocol.
pub fn decode<M: Message + Default>(input: &mut BytesMut) -> Result<Option<M>, Error> {
    let Some(prefix) = input.first_chunk::<4>() else {
        return Ok(None);
    };
    let len = u32::from_be_bytes(*prefix) as usize;
    if len > MAX_FRAME {
        return Err(Error::TooLong { len });
    }
    if input.len() < 4 + len {
        return Ok(None);
    }
    input.advance(4);
    let body: Bytes = input.split_to(len).freeze();
    M::decode(body).map(Some).map_err(Error::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::{Data, FromInit, from_init};
    use proptest::prelude::*;

    fn data(bytes: &[u8], offset: u64) -> FromInit {
        let data = Bytes::copy_from_slice(bytes);
        FromInit {
            message: Some(from_init::Message::Data(Data {
                stream: 1,
                offset,
                data,
            })),
        }
    }

    proptest! {
        #[test]
        fn frames_survive_any_cut_of_the_byte_stream(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            cut in 1usize..64,
        ) {
            let sent: Vec<_> = bodies.iter().zip(0..).map(|(body, at)| data(body, at)).collect();
            let mut wire = BytesMut::new();
            for message in &sent {
                encode(message, &mut wire).unwrap();
            }

            let (mut input, mut received) = (BytesMut::new(), Vec::new());
            for piece in wire.chunks(cut) {
                input.extend_from_slice(piece);
                while let Some(message) = decode::<FromInit>(&mut input).unwrap() {
                    received.push(message);
                }
            }
            prop_assert_eq!(received, sent);
            prop_assert!(input.is_empty());
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut input = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode::<FromInit>(&mut input) {}
        }
    }

    #[test]
    fn an_overlong_frame_is_refused_from_its_length_alone() {
        let mut input = BytesMut::from(&[0xff, 0xff, 0xff, 0xff][..]);
        assert!(matches!(
            decode::<FromInit>(&mut input),
            Err(Error::TooLong { .. })
        ));
    }
}
