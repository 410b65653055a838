//! What a CLI that waits may write, from its start to the end of its prompt: whatever it is, its
//! caller gets whole lines of JSON that are not too long.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polydev_agent::rehearsed;
use polydev_proto::{agent::MAX_LINE, provider::Vendor};

fuzz_target!(|data: &[u8]| {
    for (provider, asks) in Vendor::all().flat_map(|vendor| [(vendor, false), (vendor, true)]) {
        for line in rehearsed(provider, asks, data) {
            assert!(line.len() <= MAX_LINE && line.ends_with(b"\n"));
            let value: serde_json::Value = serde_json::from_slice(&line).expect("JSON");
            assert_eq!(value.as_object().map(serde_json::Map::len), Some(1));
        }
    }
});
