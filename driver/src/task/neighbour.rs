//! Modes that share a namespace with another task of the group.

use std::sync::Arc;

use polydev_proto::driver::TaskConfig;

use super::{Task, Tasks, book::Book};
use crate::config;

/// The other task does not run.
#[derive(Debug, thiserror::Error)]
#[error("`{field}` is `{mode}`: the group has no running task `{name}` of this driver")]
pub struct Error {
    field: &'static str,
    mode: String,
    name: String,
}

/// Puts the container of the other task in place of its name. Returns the task whose network
/// is shared.
///
/// # Errors
/// If the other task does not run. It may later.
pub(super) fn resolve(
    book: &Book,
    task: &TaskConfig,
    options: &mut config::Task,
) -> Result<Option<String>, Error> {
    let network_of = options.network_mode.as_deref();
    let network_of = network_of.and_then(|mode| named(mode, &task.alloc_id));
    let network_of = network_of.map(str::to_owned);
    for (field, mode) in [
        ("network_mode", &mut options.network_mode),
        ("ipc_mode", &mut options.ipc_mode),
        ("pid_mode", &mut options.pid_mode),
    ] {
        let Some(given) = mode else { continue };
        let Some(name) = named(given, &task.alloc_id) else {
            continue;
        };
        let container = running(book, &task.alloc_id).find(|other| other.name() == name);
        let container = container.ok_or_else(|| Error {
            field,
            mode: given.clone(),
            name: name.to_owned(),
        })?;
        *given = format!("container:{}", container.entry.container);
    }
    Ok(network_of)
}

/// The task in `task:NAME`, or in `container:NAME-ALLOC_ID`: containers of Nomad's Docker driver
/// have such names.
fn named<'m>(mode: &'m str, alloc_id: &str) -> Option<&'m str> {
    let of_docker = || {
        let name = mode.strip_prefix("container:")?;
        name.strip_suffix(alloc_id)?.strip_suffix('-')
    };
    let name = mode.strip_prefix("task:").or_else(of_docker);
    name.filter(|name| !name.is_empty())
}

fn running(book: &Book, alloc_id: &str) -> impl Iterator<Item = Arc<Task>> {
    let all = book.all().into_iter();
    all.filter(move |task| task.entry.identity.alloc_id == alloc_id && task.end().is_none())
}

/// Tells a task that has just started if the one whose network it shares has started again since
/// its container was made. `mode` is that of Docker.
pub(super) fn tell_if_behind(tasks: &Tasks, started: &Task, mode: &str) {
    let Some(name) = started.entry.network_of.as_deref() else {
        return;
    };
    let mut all = running(&tasks.book, &started.entry.identity.alloc_id);
    let is_behind = all
        .find(|other| other.name() == name)
        .is_none_or(|other| mode != format!("container:{}", other.entry.container));
    if is_behind {
        tell_of(tasks, started, name);
    }
}

/// Tells the tasks that share the network of an earlier start of this one: they are still in it,
/// and Docker cannot move them.
pub(super) fn tell(tasks: &Tasks, started: &Task) {
    let (name, alloc_id) = (started.name(), &started.entry.identity.alloc_id);
    for other in running(&tasks.book, alloc_id) {
        if other.entry.network_of.as_deref() == Some(name) {
            tell_of(tasks, &other, name);
        }
    }
}

fn tell_of(tasks: &Tasks, task: &Task, name: &str) {
    let identity = &task.entry.identity;
    let message = format!(
        "Task `{name}` was started again, and this task still has its earlier network: \
         restart this task (nomad alloc restart {} {})",
        identity.alloc_id,
        task.name()
    );
    tasks.site.events.send(identity, message);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_names_a_task_in_two_forms() {
        let alloc = "0b1c2d3e-0000-1111-2222-333344445555";
        for (mode, name) in [
            ("task:front", Some("front")),
            (
                "container:front-0b1c2d3e-0000-1111-2222-333344445555",
                Some("front"),
            ),
            (
                "container:my-vpn-0b1c2d3e-0000-1111-2222-333344445555",
                Some("my-vpn"),
            ),
            ("container:front-11112222-0000-1111-2222-333344445555", None),
            ("container:-0b1c2d3e-0000-1111-2222-333344445555", None),
            ("container:front", None),
            ("task:", None),
            ("host", None),
        ] {
            assert_eq!(named(mode, alloc), name, "{mode}");
        }
    }

    #[test]
    fn a_task_that_does_not_run_is_named() {
        let task = TaskConfig {
            alloc_id: "a".into(),
            ..Default::default()
        };
        let mut options = config::Task {
            network_mode: Some("task:front".into()),
            ..Default::default()
        };
        let error = resolve(&Book::default(), &task, &mut options).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("`network_mode` is `task:front`"),
            "{error}"
        );
    }
}
