//! Changes a job so that its tasks use this driver.

use serde_json::{Map, Value, json};

use super::findings::{attribute_here, attribute_of, of_group};
use crate::config::from_docker::{Fate, TASK};

/// Changes the driver of every task that uses Nomad's Docker driver, removes what has no meaning
/// here, and writes what is left in the form of this driver.
pub(super) fn rewrite(job: &mut Value) {
    for group in list(&mut job["TaskGroups"]) {
        let mut networks = group["Networks"].take();
        for task in list(&mut group["Tasks"]).filter(|task| task["Driver"] == "docker") {
            task["Driver"] = "polydev".into();
            if let Some(config) = task["Config"].as_object_mut() {
                self::task(config, &mut networks);
            }
        }
        group["Networks"] = networks;
    }
    attributes(job);
}

fn task(config: &mut Map<String, Value>, networks: &mut Value) {
    for row in TASK.others {
        let Fate::Refused(_) = row.fate else { continue };
        match row.option.split_once('.') {
            Some((block, inner)) => {
                for block in config.get_mut(block).into_iter().flat_map(blocks) {
                    block.as_object_mut().map(|block| block.remove(inner));
                }
            }
            None => drop(config.remove(row.option)),
        }
    }
    if let Some(mut older) = config.remove("mounts") {
        let mount = config.entry("mount").or_insert_with(|| json!([]));
        if !mount.is_array() {
            *mount = json!([mount.take()]);
        }
        if let Some(mount) = mount.as_array_mut() {
            mount.extend(blocks(&mut older).iter_mut().map(Value::take));
        }
    }
    for mode in ["network_mode", "ipc_mode", "pid_mode"] {
        let name = config.get(mode).and_then(|given| of_group(mode, given));
        if let Some(name) = name.map(|name| format!("task:{name}")) {
            config.insert(mode.into(), name.into());
        }
    }
    port_map(config, networks);
}

/// Moves `port_map` to the group's ports, if the group has them all.
fn port_map(config: &mut Map<String, Value>, networks: &mut Value) {
    let Some(mut map) = config.get("port_map").cloned() else {
        return;
    };
    let mapped: Vec<(String, Value)> = blocks(&mut map)
        .iter()
        .filter_map(Value::as_object)
        .flatten()
        .map(|(label, port)| (label.clone(), port.clone()))
        .collect();
    let is_known = |networks: &mut Value, label: &str| port(networks, label).is_some();
    if config.contains_key("ports") || !mapped.iter().all(|(label, _)| is_known(networks, label)) {
        return;
    }
    for (label, inside) in &mapped {
        if let Some(port) = port(networks, label) {
            port["To"] = inside.clone();
        }
    }
    config.remove("port_map");
    let labels = mapped.into_iter().map(|(label, _)| label);
    config.insert("ports".into(), labels.collect());
}

/// A port of the group.
fn port<'n>(networks: &'n mut Value, label: &str) -> Option<&'n mut Value> {
    let networks = networks.as_array_mut()?.iter_mut();
    let networks = networks.filter_map(Value::as_object_mut);
    let mut ports = networks
        .flat_map(|network| network.iter_mut())
        .filter(|(kind, _)| matches!(&***kind, "DynamicPorts" | "ReservedPorts"))
        .flat_map(|(_, ports)| list(ports));
    ports.find(|port| port["Label"] == label)
}

/// Gives the attributes of Nomad's Docker driver this driver's names.
fn attributes(value: &mut Value) {
    match value {
        Value::String(text) => {
            let here = attribute_of(text).and_then(|name| Some((name, attribute_here(name)?)));
            if let Some((name, here)) = here {
                *text = text.replace(name, &here);
            }
        }
        Value::Array(list) => list.iter_mut().for_each(attributes),
        Value::Object(map) => map.values_mut().for_each(attributes),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn list(value: &mut Value) -> impl Iterator<Item = &mut Value> {
    value.as_array_mut().into_iter().flatten()
}

/// A block, alone or in a list.
fn blocks(value: &mut Value) -> &mut [Value] {
    match value {
        Value::Array(list) => list,
        one => std::slice::from_mut(one),
    }
}
