//! A line of an audit log: whatever is read is written as it was, and nobody without the key makes
//! one that is right.
#![no_main]

use std::hash::{DefaultHasher, Hash, Hasher};

use libfuzzer_sys::fuzz_target;
use polydev_shim::audit::{
    chain::{BEGIN, Key, Line},
    ocsf,
};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    // The fuzzer sees what is compared, and would learn the code for a key that stays the same.
    // This one is another for each code that it tries.
    let mut hasher = DefaultHasher::new();
    data.hash(&mut hasher);
    let hash = hasher.finish().to_le_bytes();
    let key = Key::new(&std::array::from_fn(|index| hash[index % hash.len()]));
    let Some((line, code)) = Line::read(&key, &BEGIN, text) else {
        return;
    };
    assert_eq!(code, None, "it has the right code");
    let _event = ocsf::event(&line);
    let (written, code) = line.write(&key, &BEGIN);
    assert_eq!(Line::read(&key, &BEGIN, &written), Some((line, Some(code))));
});
