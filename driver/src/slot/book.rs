//! The slots of this node, for the Nomad service, the node service and the reaper.

use std::{collections::HashMap, sync::Arc};

use parking_lot::{Mutex, MutexGuard};
use polydev_proto::id::SlotId;
use tokio::sync::watch;

use super::Slot;

/// All slots by Nomad's task id. An ended slot stays until Nomad destroys its task.
#[derive(Debug)]
pub struct Book {
    slots: Mutex<HashMap<String, Arc<Slot>>>,
    changed: watch::Sender<u64>,
}

/// The allocation already has a slot.
#[derive(Debug, thiserror::Error)]
#[error(
    "allocation `{alloc_id}` already has a slot in another task; a group may have only one slot"
)]
pub struct Duplicate {
    pub alloc_id: String,
}

impl Book {
    #[must_use]
    pub fn new() -> Self {
        Self {
            slots: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }

    #[must_use]
    pub fn by_task(&self, task_id: &str) -> Option<Arc<Slot>> {
        self.lock().get(task_id).cloned()
    }

    #[must_use]
    pub fn by_slot_id(&self, slot_id: &SlotId) -> Option<Arc<Slot>> {
        let slots = self.lock();
        let live = |slot: &&Arc<Slot>| slot.identity.slot_id() == *slot_id && slot.end().is_none();
        slots.values().find(live).cloned()
    }

    #[must_use]
    pub fn all(&self) -> Vec<Arc<Slot>> {
        self.lock().values().cloned().collect()
    }

    /// # Errors
    /// [`Duplicate`] if the allocation has a live slot under another task.
    pub fn check(&self, slot: &crate::identity::Identity) -> Result<(), Duplicate> {
        match self.by_slot_id(&slot.slot_id()) {
            Some(other) if other.identity.task_id != slot.task_id => Err(Duplicate {
                alloc_id: slot.alloc_id.clone(),
            }),
            _ => Ok(()),
        }
    }

    pub fn add(&self, slot: Arc<Slot>) {
        self.lock().insert(slot.identity.task_id.clone(), slot);
        self.changed.send_modify(|version| *version += 1);
    }

    pub fn remove(&self, task_id: &str) {
        self.lock().remove(task_id);
        self.changed.send_modify(|version| *version += 1);
    }

    /// Changes whenever a slot is added, removed or takes a step.
    #[must_use]
    pub fn changes(&self) -> watch::Sender<u64> {
        self.changed.clone()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Slot>>> {
        self.slots.lock()
    }
}

impl Default for Book {
    fn default() -> Self {
        Self::new()
    }
}
