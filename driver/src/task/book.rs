//! The plain tasks of this node, for the Nomad service and the reaper.

use std::{collections::HashMap, sync::Arc};

use parking_lot::{Mutex, MutexGuard};

use super::Task;

/// All tasks by Nomad's task id. An ended task stays until Nomad destroys it.
#[derive(Debug, Default)]
pub struct Book {
    tasks: Mutex<HashMap<String, Arc<Task>>>,
}

impl Book {
    #[must_use]
    pub fn get(&self, task_id: &str) -> Option<Arc<Task>> {
        self.lock().get(task_id).cloned()
    }

    #[must_use]
    pub fn all(&self) -> Vec<Arc<Task>> {
        self.lock().values().cloned().collect()
    }

    pub fn add(&self, task: Arc<Task>) {
        self.lock()
            .insert(task.entry.identity.task_id.clone(), task);
    }

    pub fn remove(&self, task_id: &str) {
        self.lock().remove(task_id);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Task>>> {
        self.tasks.lock()
    }
}
