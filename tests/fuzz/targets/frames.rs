//! The link between driver and init, in both directions: a container is not to be trusted,
//! and init outlives the driver it was started by.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use polydev_proto::{
    frame,
    init::{FromInit, ToInit},
};

fuzz_target!(|data: &[u8]| {
    // The first byte says how the rest is cut into reads.
    let Some((&cut, data)) = data.split_first() else {
        return;
    };
    let whole = messages::<FromInit>(data, data.len());
    assert_eq!(
        whole,
        messages::<FromInit>(data, usize::from(cut)),
        "a cut changes nothing"
    );
    messages::<ToInit>(data, usize::from(cut));
});

/// All messages until the bytes end or are refused; each survives being written again.
fn messages<M>(data: &[u8], cut: usize) -> Vec<Vec<u8>>
where
    M: Default + PartialEq + prost::Message + std::fmt::Debug,
{
    let (mut input, mut read) = (BytesMut::new(), Vec::new());
    for piece in data.chunks(cut.max(1)) {
        input.extend_from_slice(piece);
        loop {
            match frame::decode::<M>(&mut input) {
                Ok(Some(message)) => {
                    let mut out = BytesMut::new();
                    frame::encode(&message, &mut out).expect("what was read is not too long");
                    read.push(out.to_vec());
                    let again = frame::decode::<M>(&mut out);
                    assert_eq!(
                        again.ok().flatten(),
                        Some(message),
                        "what is written is read"
                    );
                }
                Ok(None) => break,
                Err(_) => return read,
            }
        }
    }
    read
}
