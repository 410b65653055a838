//! What an earlier life of the driver, or another version of it, has left: the state that
//! Nomad keeps of a task, and the records of tasks and idle containers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polydev_driver::{service::DriverState, slot::shelf::Idle, task::journal::Entry};

fuzz_target!(|data: &[u8]| {
    if let Ok(state) = DriverState::decode(data) {
        let again = DriverState::decode(&state.encode());
        assert_eq!(again.ok(), Some(state), "what is written is read");
    }
    if let Ok(entry) = serde_json::from_slice::<Entry>(data) {
        let text = serde_json::to_vec(&entry).expect("an entry can be written");
        serde_json::from_slice::<Entry>(&text).expect("what is written is read");
    }
    if let Ok(idle) = serde_json::from_slice::<Idle>(data) {
        let text = serde_json::to_vec(&idle).expect("a record can be written");
        assert_eq!(serde_json::from_slice::<Idle>(&text).ok(), Some(idle));
    }
});
