//! The bytes that Nomad stores for the driver with each task.

use crate::config::Slot;

/// Version of these bytes; 0 is reserved by Nomad.
pub(super) const VERSION: i32 = 1;

/// What Nomad stores of a task besides its configuration. Nomad does not keep the driver
/// part of the configuration. A plain task is in the driver's own journal.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DriverState {
    pub slot: Option<Slot>,
}

impl DriverState {
    /// Reads what Nomad has stored.
    ///
    /// # Errors
    /// If the bytes were not written by [`DriverState::encode`].
    pub fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("it is made of strings")
    }
}
