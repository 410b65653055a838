//! What Nomad calls a task, a warm slot or a plain task, behind one interface.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use polydev_proto::driver::{
    ExitResult, InspectTaskResponse, NetworkOverride, TaskDriverStatus, TaskState, TaskStatus,
    WaitTaskResponse,
};
use prost_types::Timestamp;

use crate::{
    limits::Usage,
    node::Node,
    run::cancel::Cause,
    slot::{self, Slot},
    task::{Exit, Task},
};

/// A Nomad task.
#[derive(Debug, Clone)]
pub(super) enum Work {
    Slot(Arc<Slot>),
    Plain(Arc<Task>),
}

impl Work {
    pub(super) fn find(node: &Node, task_id: &str) -> Option<Self> {
        let plain = || node.tasks.book.get(task_id).map(Self::Plain);
        node.slots
            .book
            .by_task(task_id)
            .map(Self::Slot)
            .or_else(plain)
    }

    pub(super) fn task_id(&self) -> &str {
        match self {
            Self::Slot(slot) => &slot.identity.task_id,
            Self::Plain(task) => &task.entry.identity.task_id,
        }
    }

    pub(super) fn usage(&self) -> Usage {
        match self {
            Self::Slot(slot) => slot.usage(),
            Self::Plain(task) => task.usage(),
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        match self {
            Self::Slot(slot) => slot.end().is_some(),
            Self::Plain(task) => task.end().is_some(),
        }
    }

    /// Waits until the task has ended.
    pub(super) async fn wait(&self) -> WaitTaskResponse {
        let (result, err) = match self {
            Self::Slot(slot) => {
                slot.want();
                slot_end(slot.ended().await)
            }
            Self::Plain(task) => {
                let exit = task.ended().await;
                (exit_result(&exit), exit.error)
            }
        };
        WaitTaskResponse {
            result: Some(result),
            err,
        }
    }

    /// For a slot this only requests the stop: a claimed slot stays Nomad's task until its
    /// run ends. The run in a slot on demand is cancelled. For a plain task this waits
    /// until the task has ended.
    pub(super) async fn stop(&self, node: &Node, signal: &str, limit: Duration) {
        match self {
            Self::Slot(slot) => {
                slot.want();
                slot.drain();
                if slot.is_on_demand()
                    && let Some(run) = node.runs.open_in(&slot.identity.slot_id())
                {
                    let cause = Cause::Asked("Nomad stopped its slot".into());
                    node.runs.cancel(&run, cause);
                }
            }
            Self::Plain(task) => task.stop(signal, limit).await,
        }
    }

    /// Ends what still runs, and forgets the task and all its resources.
    pub(super) async fn destroy(&self, node: &Node) {
        match self {
            Self::Slot(slot) => {
                slot.kill();
                slot.ended().await;
                node.slots.book.remove(&slot.identity.task_id);
            }
            Self::Plain(task) => task.destroy(&node.tasks).await,
        }
    }

    pub(super) fn inspect(&self) -> InspectTaskResponse {
        let (identity, started) = match self {
            Self::Slot(slot) => (&slot.identity, slot.started),
            Self::Plain(task) => (&task.entry.identity, task.entry.started),
        };
        // Go's zero time, for a task that has not ended.
        let never = Timestamp {
            seconds: -62_135_596_800,
            nanos: 0,
        };
        let end = self.end();
        let completed = end.as_ref().map_or(never, |(_, at)| (*at).into());
        let task = TaskStatus {
            id: identity.task_id.clone(),
            name: identity.task_name.clone(),
            state: if end.is_none() {
                TaskState::Running
            } else {
                TaskState::Exited
            }
            .into(),
            started_at: Some(started.into()),
            completed_at: Some(completed),
            result: Some(end.map(|(result, _)| result).unwrap_or_default()),
        };
        let attributes = self
            .attributes()
            .map(|(name, value)| (name.to_owned(), value));
        InspectTaskResponse {
            task: Some(task),
            driver: Some(TaskDriverStatus {
                attributes: attributes.into(),
            }),
            network_override: self.network(),
        }
    }

    /// The address for services with `address_mode = "driver"`, or `auto` in a network of
    /// the user's.
    pub(super) fn network(&self) -> Option<NetworkOverride> {
        let Self::Plain(task) = self else { return None };
        let entry = &task.entry;
        entry.address.map(|address| NetworkOverride {
            port_map: entry.ports.iter().cloned().collect(),
            addr: address.to_string(),
            auto_advertise: entry.auto_advertise,
        })
    }

    fn end(&self) -> Option<(ExitResult, SystemTime)> {
        match self {
            Self::Slot(slot) => slot.end().map(|(end, at)| (slot_end(end).0, at)),
            Self::Plain(task) => task.end().map(|exit| {
                let at = exit.at.unwrap_or(task.entry.started);
                (exit_result(&exit), at)
            }),
        }
    }

    fn attributes(&self) -> [(&'static str, String); 4] {
        match self {
            Self::Slot(slot) => {
                let life = slot.life();
                [
                    ("provider", slot.config.provider.to_string()),
                    ("image", slot.config.image.clone()),
                    ("state", life.state().name().to_owned()),
                    ("generation", life.generation().to_string()),
                ]
            }
            Self::Plain(task) => [
                ("container_id", task.entry.container.clone()),
                ("image", task.entry.image.clone()),
                ("pid", task.entry.pid.to_string()),
                ("init", task.entry.link.is_some().to_string()),
            ],
        }
    }
}

fn exit_result(exit: &Exit) -> ExitResult {
    ExitResult {
        exit_code: exit.code,
        signal: exit.signal,
        oom_killed: exit.oom_killed,
    }
}

fn slot_end(end: slot::Ended) -> (ExitResult, String) {
    let (exit_code, err) = match end {
        slot::Ended::Stopped => (0, String::new()),
        slot::Ended::Failed { reason } => (1, reason),
    };
    let result = ExitResult {
        exit_code,
        ..Default::default()
    };
    (result, err)
}
