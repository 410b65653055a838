//! Starts what Nomad calls a task: a slot or a plain task.

use std::{sync::Arc, time::Duration};

use polydev_proto::driver::TaskConfig;

use super::Error;
use crate::{
    config,
    identity::Identity,
    limits::Limits,
    slot::{Slot, Slots},
    task::{self, Tasks},
};

/// How long init may take to report whether the command of an interrupted start runs.
const KNOWN_TIMEOUT: Duration = Duration::from_secs(3);

/// Creates a slot that is not wanted yet; `Ready` reports when it is idle.
pub(super) fn slot(
    slots: &Arc<Slots>,
    task: &TaskConfig,
    config: config::Slot,
) -> Result<Option<(Arc<Slot>, Ready)>, Error> {
    let identity = Identity::of(task);
    slots.book.check(&identity)?;
    if slots.book.by_task(&identity.task_id).is_some() {
        return Ok(None); // The agent lost the first call and repeats it.
    }
    let idle = idle_limits(task)?;
    let (slot, ready) = Slot::start(slots, identity, config, idle);
    slots.book.add(slot.clone());
    Ok(Some((slot, ready)))
}

pub(super) type Ready = tokio::sync::oneshot::Receiver<Result<(), crate::slot::FillError>>;

/// Starts a plain task, and finishes the start even if the call ends early. In that case it
/// destroys the task, because no agent will ask for it.
pub(super) async fn plain(
    tasks: &Arc<Tasks>,
    task: &TaskConfig,
    options: config::Task,
) -> Result<(), Error> {
    if let Some(known) = tasks.book.get(&task.id) {
        // The agent repeats a call if the driver died during it. A command that has run
        // does not run again, however it ended; one that never started does.
        match tokio::time::timeout(KNOWN_TIMEOUT, known.ended()).await {
            Ok(exit) if exit.error == task::NEVER_STARTED => known.destroy(tasks).await,
            _ => return Ok(()),
        }
    }
    let (tasks, task) = (tasks.clone(), task.clone());
    let (done, is_done) = tokio::sync::oneshot::channel();
    tasks.site.clone().background.spawn(async move {
        let started = task::start(&tasks, &task, options).await;
        let began = started.as_ref().ok().cloned();
        if done.send(started.map(drop)).is_err()
            && let Some(began) = began
        {
            began.destroy(&tasks).await;
        }
    });
    let started = is_done.await.map_err(|_| Error::StoppedWhileStarting)?;
    started.map_err(Error::Task)
}

/// The idle limits of a slot: the CPU and memory that its job reserves.
fn idle_limits(task: &TaskConfig) -> Result<Limits, Error> {
    let missing = || Error::Missing { field: "resources" };
    let resources = task
        .resources
        .as_ref()
        .and_then(|r| r.allocated_resources.as_ref());
    let resources = resources.ok_or_else(missing)?;
    let positive = |value: i64| u32::try_from(value).ok().filter(|value| *value > 0);
    let cpu = resources
        .cpu
        .as_ref()
        .and_then(|cpu| positive(cpu.cpu_shares));
    let memory = resources
        .memory
        .as_ref()
        .and_then(|memory| positive(memory.memory_mb));
    Ok(Limits {
        cpu_mhz: cpu.ok_or_else(missing)?,
        memory_mb: memory.ok_or_else(missing)?,
        ..Limits::IDLE
    })
}
