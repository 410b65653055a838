//! Answers of an API, and messages on a WebSocket: what they state does not depend on the pieces in
//! which they come.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polydev_broker::{
    frames::{Frames, NoFrames, Part},
    scanner::Scanner,
};
use polydev_proto::provider::Vendor;

/// How many messages begin and end, and the text of all; as far as it is one.
fn messages<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (usize, usize, Vec<u8>) {
    let (mut frames, mut seen) = (Frames::default(), (0, 0, Vec::new()));
    for piece in pieces {
        let read = frames.read(piece, |part| {
            match part {
                Part::Begin => seen.0 += 1,
                Part::Text(text) => seen.2.extend_from_slice(text),
                Part::End => seen.1 += 1,
            }
            Ok::<_, NoFrames>(())
        });
        if read.is_err() {
            break;
        }
    }
    seen
}

fuzz_target!(|data: &[u8]| {
    let Some((which, answer)) = data.split_first() else {
        return;
    };
    let provider = match which % 3 {
        0 => Vendor::OpenAi,
        1 => Vendor::Anthropic,
        _ => Vendor::Google,
    };
    let mut whole = Scanner::new(provider);
    whole.read(answer);
    let mut in_pieces = Scanner::new(provider);
    for piece in answer.chunks(usize::from(*which) / 3 + 1) {
        in_pieces.read(piece);
    }
    assert_eq!(whole.stated(), in_pieces.stated());
    assert_eq!(whole.overload(), in_pieces.overload());
    let pieces = answer.chunks(usize::from(*which) / 3 + 1);
    assert_eq!(messages([answer].into_iter()), messages(pieces));
});
