//! What the caller of a conversation may write on its run's stdin: it is understood alike however
//! it is cut, and every prompt is one that the CLI takes for a text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polydev_agent::conversed;
use polydev_proto::{prompt, provider::Vendor};

fuzz_target!(|data: &[u8]| {
    let [piece, said @ ..] = data else { return };
    for provider in Vendor::all() {
        let whole = conversed(provider, said, said.len());
        assert_eq!(whole, conversed(provider, said, usize::from(*piece)));
        for text in whole.0.into_iter().flatten() {
            prompt::check(&text, "").expect("a prompt that may be given");
            assert!(
                provider == Vendor::OpenAi || !text.starts_with('/'),
                "{provider} takes it for a command"
            );
        }
    }
});
