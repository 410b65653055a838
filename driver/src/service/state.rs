//! The bytes that Nomad keeps of a task for the driver.

use crate::config::Slot;

/// Version of these bytes; 0 is Nomad's own.
pub(super) const VERSION: i32 = 1;

/// What Nomad keeps of a task besides its configuration, whose driver part it forgets.
/// A plain task is in the driver's own journal.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DriverState {
    pub slot: Option<Slot>,
}

impl DriverState {
    /// Reads what Nomad has kept.
    ///
    /// # Errors
    /// If it is not what [`DriverState::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("it is made of strings")
    }
}
