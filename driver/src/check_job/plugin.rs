//! What the operator's options of the plugin must allow.

use std::path::Path;

use anyhow::{Context, bail};
use serde_json::{Map, Value};

use super::shape::shape;
use crate::config::{MountKind, Plugin, Task, schema};

/// The plugin's options, from `NAME=VALUE` each. A name has its block, such as `volumes.enabled`.
/// A value is JSON, or a text.
///
/// # Errors
/// If there is no such option, or it has no such value.
pub(super) fn options(given: &[String]) -> anyhow::Result<Plugin> {
    let schema = schema::plugin();
    let mut all = Value::Object(Map::new());
    for given in given {
        let Some((name, value)) = given.split_once('=') else {
            bail!("`--plugin` is `{given}`: must be NAME=VALUE");
        };
        let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
        let one = (name.rsplit('.')).fold(value, |inner, name| {
            Value::Object(Map::from_iter([(name.to_owned(), inner)]))
        });
        // Of a name that the schema does not have, nothing is left.
        let is_known = leaf(&shape(&schema, &one));
        anyhow::ensure!(
            is_known,
            "`--plugin` is `{given}`: the plugin has no option `{name}`"
        );
        merge(&mut all, one);
    }
    let msgpack = rmp_serde::to_vec_named(&shape(&schema, &all))?;
    Plugin::parse(&msgpack).context("`--plugin`")
}

fn leaf(value: &Value) -> bool {
    match value {
        Value::Object(map) => map.values().next().is_some_and(leaf),
        _ => true,
    }
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (name, value) in from {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

/// What a task asks for that these options do not allow.
pub(super) fn needs(task: &Task, plugin: &Plugin) -> Vec<String> {
    let mut needs: Vec<_> = (task.not_allowed(plugin).iter())
        .map(ToString::to_string)
        .collect();
    if plugin.volumes {
        return needs;
    }
    let enabled = |option: &str, given: &str| {
        format!(
            "`{option}` is `{given}`: must be in the task's folder, unless the plugin sets `volumes.enabled`"
        )
    };
    let is_hosts = |path: &str| Path::new(path).is_absolute();
    needs.extend(
        task.volume_driver
            .as_deref()
            .map(|name| enabled("volume_driver", name)),
    );
    let volumes = task
        .volumes
        .iter()
        .filter(|volume| is_hosts(&volume.source));
    needs.extend(volumes.map(|volume| enabled("volumes", &volume.source)));
    needs.extend(task.mounts.iter().filter_map(|mount| match &mount.kind {
        MountKind::Bind { source, .. } if is_hosts(source) => Some(enabled("mount.source", source)),
        MountKind::Volume { .. } => Some(enabled("mount.type", "volume")),
        MountKind::Bind { .. } | MountKind::Tmpfs { .. } => None,
    }));
    needs
}
