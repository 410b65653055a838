//! Answers of an API: what they state does not depend on the pieces in which they come.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polydev_broker::usage::Scanner;
use polydev_proto::provider::Provider;

fuzz_target!(|data: &[u8]| {
    let Some((which, answer)) = data.split_first() else {
        return;
    };
    let provider = match which % 3 {
        0 => Provider::OpenAi,
        1 => Provider::Anthropic,
        _ => Provider::Google,
    };
    let mut whole = Scanner::new(provider);
    whole.read(answer);
    let mut in_pieces = Scanner::new(provider);
    for piece in answer.chunks(usize::from(*which) / 3 + 1) {
        in_pieces.read(piece);
    }
    assert_eq!(whole.stated(), in_pieces.stated());
});
