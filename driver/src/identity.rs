//! Which Nomad task a container or network belongs to, and the labels that record this.

use std::collections::BTreeMap;

use polydev_proto::{driver::TaskConfig, id::SlotId};
use wildmatch::WildMatch;

use crate::config::EXTRA_LABELS;

/// The driver instance that owns a container; reapers ignore containers of other instances.
pub const LABEL_INSTANCE: &str = "dev.polydev.instance";
/// The slot.
pub const LABEL_SLOT: &str = "dev.polydev.slot";
/// The life of the driver that created a slot's container.
pub const LABEL_START: &str = "dev.polydev.start";
/// The number of the container in its slot, from 1.
pub const LABEL_GENERATION: &str = "dev.polydev.generation";
/// The plain task, by Nomad's id.
pub const LABEL_TASK: &str = "dev.polydev.task";
/// The allocation whose network a container holds.
pub const LABEL_NETWORK: &str = "dev.polydev.network";
/// The container of a group's network. Nomad looks for this label when it writes the
/// group's hosts file.
pub(crate) const LABEL_SANDBOX: &str = "docker_sandbox_container_id";
/// The allocation, for log shippers and metrics. Not under Nomad's own name: Nomad's Docker
/// driver removes containers with that label that it does not own.
const LABEL_ALLOC: &str = "dev.polydev.alloc_id";

/// A task, as Nomad names it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Identity {
    /// Nomad's id of the task: allocation, name and a part that changes with each start.
    pub task_id: String,
    pub task_name: String,
    pub alloc_id: String,
    pub job_id: String,
    pub namespace: String,
    pub node_id: String,
}

impl Identity {
    #[must_use]
    pub fn of(task: &TaskConfig) -> Self {
        Self {
            task_id: task.id.clone(),
            task_name: task.name.clone(),
            alloc_id: task.alloc_id.clone(),
            job_id: task.job_id.clone(),
            namespace: task.namespace.clone(),
            node_id: task.node_id.clone(),
        }
    }

    /// Node id and allocation id: the slot's id for shims.
    #[must_use]
    pub fn slot_id(&self) -> SlotId {
        format!("{}/{}", self.node_id, self.alloc_id).into()
    }

    /// The same for every attempt at one start, so that leftovers are found. It contains no
    /// dashed UUID, because Nomad's Docker driver claims such names.
    #[must_use]
    pub fn container_name(&self) -> String {
        let allowed = |letter: char| {
            if letter.is_ascii_alphanumeric() || "_.-".contains(letter) {
                letter
            } else {
                '_'
            }
        };
        let name: String = self.task_name.chars().map(allowed).take(64).collect();
        let alloc = self.alloc_id.replace('-', "");
        let start = self.task_id.rsplit('/').next().unwrap_or_default();
        let start: String = start.chars().map(allowed).take(16).collect();
        format!("polydev-{name}-{alloc}-{start}")
    }
}

/// Labels of a plain task's container: the driver's, the job's, and those that the plugin's
/// `extra_labels` selects.
#[must_use]
pub fn labels(
    instance: &str,
    task: &TaskConfig,
    own: &BTreeMap<String, String>,
    extra: &[String],
) -> BTreeMap<String, String> {
    let parent = task.env.get("NOMAD_JOB_PARENT_ID").cloned();
    let value = |label: &str| match label {
        "job_id" => task.job_id.clone(),
        "job_name" => task.job_name.clone(),
        "namespace" => task.namespace.clone(),
        "node_id" => task.node_id.clone(),
        "node_name" => task.node_name.clone(),
        "parent_job_id" => parent.clone().unwrap_or_default(),
        "task_group_name" => task.task_group_name.clone(),
        _ => task.name.clone(),
    };
    let wanted = EXTRA_LABELS
        .into_iter()
        .filter(|label| extra.iter().any(|glob| WildMatch::new(glob).matches(label)))
        .map(|label| (format!("com.hashicorp.nomad.{label}"), value(label)));
    let ours = [
        (LABEL_INSTANCE, instance),
        (LABEL_TASK, &task.id),
        (LABEL_ALLOC, &task.alloc_id),
    ];
    let ours = ours.map(|(label, value)| (label.to_owned(), value.to_owned()));
    own.clone().into_iter().chain(wanted).chain(ours).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task() -> TaskConfig {
        TaskConfig {
            id: "0b1c2d3e-0000-1111-2222-333344445555/web app/0a1b2c3d".into(),
            name: "web app".into(),
            alloc_id: "0b1c2d3e-0000-1111-2222-333344445555".into(),
            task_group_name: "group".into(),
            job_name: "job".into(),
            ..Default::default()
        }
    }

    /// Fact: Nomad's Docker driver removes containers that carry its label, or a name
    /// with a dashed UUID.
    #[test]
    fn names_and_labels_are_not_those_of_nomads_docker_driver() {
        let name = Identity::of(&task()).container_name();
        assert_eq!(
            name,
            "polydev-web_app-0b1c2d3e000011112222333344445555-0a1b2c3d"
        );
        let labels = labels("i", &task(), &BTreeMap::new(), &["*".into()]);
        assert!(!labels.contains_key("com.hashicorp.nomad.alloc_id"));
        assert_eq!(labels.len(), 3 + EXTRA_LABELS.len());
    }

    /// C051.
    #[test]
    fn extra_labels_are_globs() {
        let labels = labels(
            "i",
            &task(),
            &BTreeMap::new(),
            &["task*".into(), "job_name".into()],
        );
        let extra = labels
            .keys()
            .filter(|label| label.starts_with("com.hashicorp"));
        assert_eq!(extra.count(), 3);
        assert_eq!(labels["com.hashicorp.nomad.task_group_name"], "group");
    }
}
