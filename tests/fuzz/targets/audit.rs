//! A line of an audit log: whatever is read is written as it was, and nobody without the key makes
//! one that is right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polydev_shim::audit::{
    chain::{BEGIN, Key, Line},
    ocsf,
};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let key = Key::new(&[7; 32]);
    let Some((line, code)) = Line::read(&key, &BEGIN, text) else {
        return;
    };
    assert_eq!(code, None, "it has the right code");
    let _event = ocsf::event(&line);
    let (written, code) = line.write(&key, &BEGIN);
    assert_eq!(Line::read(&key, &BEGIN, &written), Some((line, Some(code))));
});
