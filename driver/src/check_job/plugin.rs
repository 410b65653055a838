//! What the operator's options of the plugin must allow.

use anyhow::{Context, bail};
use polydev_proto::hclspec::{Spec, spec::Block};
use serde_json::{Map, Value};

use super::json::{blocks, list, word};
use crate::config::{Plugin, schema};

/// The plugin's options, from `NAME=VALUE` each. A name has its block, such as `volumes.enabled`.
/// A list is in JSON.
///
/// # Errors
/// If there is no such option, or it has no such value.
pub(super) fn options(given: &[String]) -> anyhow::Result<Plugin> {
    let schema = schema::plugin();
    let mut all = Value::Object(Map::new());
    for given in given {
        let Some((name, text)) = given.split_once('=') else {
            bail!("`--plugin` is `{given}`: must be NAME=VALUE");
        };
        let Some(kind) = kind(&schema, name) else {
            bail!("`--plugin` is `{given}`: the plugin has no option `{name}` with a value");
        };
        let (value, allowed) = match kind {
            "string" => (Some(text.into()), "a text"),
            "bool" => (text.parse().ok().map(Value::Bool), "true or false"),
            "number" => (text.parse::<f64>().ok().map(Value::from), "a number"),
            "list(string)" => {
                let list = serde_json::from_str::<Vec<String>>(text);
                (list.ok().map(Value::from), "a list, such as [\"all\"]")
            }
            other => {
                bail!("`--plugin` is `{given}`: `{name}` is a {other}, which it cannot be given")
            }
        };
        let Some(value) = value else {
            bail!("`--plugin` is `{given}`: must be {allowed}");
        };
        let mut place = &mut all;
        for name in name.split('.') {
            let Value::Object(map) = place else { break };
            place = map.entry(name).or_insert_with(|| Value::Object(Map::new()));
        }
        *place = value;
    }
    Plugin::parse(&rmp_serde::to_vec_named(&all)?).context("`--plugin`")
}

/// The type of an option, by its name with its blocks.
fn kind<'s>(spec: &'s Spec, name: &str) -> Option<&'s str> {
    let (first, rest) = name.split_once('.').unwrap_or((name, ""));
    match spec.block.as_ref()? {
        Block::Object(object) => {
            let child = object.attributes.get(first)?;
            match child.block.as_ref()? {
                Block::BlockValue(block) => kind(block.nested.as_deref()?, rest),
                _ => kind(child, rest),
            }
        }
        Block::Attr(attr) if name.is_empty() => Some(&attr.r#type),
        Block::Default(with) => kind(with.primary.as_deref()?, name),
        _ => None,
    }
}

/// What an option needs that `volumes.enabled` allows. A folder of the host is one whatever the end
/// of its path is, so that variables do not matter.
pub(super) fn volumes(option: &str, value: &Value) -> Vec<String> {
    let is_hosts = |path: &&str| path.starts_with('/');
    match option {
        "volume_driver" => vec![volume(option, word(value))],
        "volumes" => {
            let volumes = list(value).map(word).filter(is_hosts);
            volumes.map(|given| folder(option, given)).collect()
        }
        "mount" | "mounts" => blocks(value)
            .filter_map(|mount| match word(&mount["type"]) {
                "" | "volume" => Some(volume("mount.type", "volume")),
                _ => {
                    let source = Some(word(&mount["source"])).filter(is_hosts)?;
                    Some(folder("mount.source", source))
                }
            })
            .collect(),
        _ => Vec::new(),
    }
}

fn folder(option: &str, given: &str) -> String {
    enabled(option, given, "a folder of the host")
}

fn volume(option: &str, given: &str) -> String {
    enabled(option, given, "a Docker volume")
}

fn enabled(option: &str, given: &str, what: &str) -> String {
    format!("`{option}` is `{given}`: {what} must be allowed by the plugin's `volumes.enabled`")
}
