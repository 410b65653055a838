//! What an earlier life of the driver, or another version of it, has left: the state that
//! Nomad keeps of a task, and the entries of the journal.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polydev_driver::{service::DriverState, task::journal::Entry};

fuzz_target!(|data: &[u8]| {
    if let Ok(state) = DriverState::decode(data) {
        let again = DriverState::decode(&state.encode());
        assert_eq!(again.ok(), Some(state), "what is written is read");
    }
    if let Ok(entry) = Entry::decode(data) {
        assert!(
            Entry::decode(&entry.encode()).is_ok(),
            "what is written is read"
        );
    }
});
