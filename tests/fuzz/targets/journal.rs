//! The journal of runs, as a crash, another version or somebody's hand has left it.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use polydev_driver::run::journal::{decode, encode};

fuzz_target!(|data: &[u8]| {
    let path = Path::new("runs.journal");
    let Ok(decoded) = decode(path, data) else {
        return;
    };
    assert!(decoded.whole <= data.len());
    // Checksums are beyond a fuzzer: each line is tried as what would pass.
    for line in data.split(|byte| *byte == b'\n') {
        let Ok(record) = serde_json::from_slice(line) else {
            continue;
        };
        let format = polydev_driver::run::journal::Record::Format {
            version: 1,
            begun: std::time::SystemTime::UNIX_EPOCH,
        };
        let whole = [encode(&format), encode(&record)].concat();
        if let Ok(again) = decode(path, &whole) {
            assert_eq!(again.records, [record], "what is written is read");
        }
    }
});
