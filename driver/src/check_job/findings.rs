//! Compares a job's tasks with this driver.

use std::collections::BTreeMap;

use anyhow::bail;
use serde_json::Value;

use super::{
    json::{blocks, list, word},
    plugin,
    shape::shape,
};
use crate::{
    chain,
    config::{
        Config, Plugin,
        from_docker::{Fate, TASK},
        schema,
    },
};

/// Options whose values this driver does not check.
const FREE: [&str; 6] = [
    "args",
    "command",
    "entrypoint",
    "hostname",
    "image",
    "work_dir",
];

/// A job's tasks of Nomad's Docker driver.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) tasks: Vec<Task>,
}

#[derive(Debug)]
pub(super) struct Task {
    /// Group and task.
    pub(super) name: String,
    /// Options that are the same.
    pub(super) same: Vec<String>,
    /// Options with values that only the node knows.
    pub(super) unknown: Vec<String>,
    pub(super) findings: Vec<Finding>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) kind: Kind,
    pub(super) text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// It works otherwise.
    Differs,
    /// It works, and there is a newer form.
    Older,
    /// The task does not run until the plugin's options allow this.
    Allow,
    /// The task does not run, or not as it should, until this is changed.
    Change,
}

impl Checked {
    /// How many things must be changed, in the job or in the plugin's options.
    pub(super) fn changes(&self) -> usize {
        let findings = self.tasks.iter().flat_map(|task| &task.findings);
        let must = |one: &&Finding| matches!(one.kind, Kind::Change | Kind::Allow);
        findings.filter(must).count()
    }

    pub(super) fn is_ready(&self) -> bool {
        self.changes() == 0
    }
}

/// # Errors
/// If no task uses Nomad's Docker driver.
pub(super) fn check(job: &Value, plugin: &Plugin) -> anyhow::Result<Checked> {
    let checked = of_driver(job, "docker", plugin);
    if !checked.tasks.is_empty() {
        return Ok(checked);
    }
    match check_rewritten(job, plugin).tasks[..] {
        [] => bail!("no task of the job has `driver = \"docker\"`"),
        [..] => bail!("the job has this driver already: no task has `driver = \"docker\"`"),
    }
}

/// The same for a job whose tasks have this driver.
pub(super) fn check_rewritten(job: &Value, plugin: &Plugin) -> Checked {
    of_driver(job, "polydev", plugin)
}

fn of_driver(job: &Value, driver: &str, plugin: &Plugin) -> Checked {
    let of_job = attributes(&[&job["Constraints"], &job["Affinities"], &job["Spreads"]]);
    let mut tasks = Vec::new();
    for group in list(&job["TaskGroups"]) {
        let mut of_group = attributes(&[
            &group["Constraints"],
            &group["Affinities"],
            &group["Spreads"],
        ]);
        of_group.extend(of_job.iter().cloned());
        let mut of_connect = connect(group);
        for task in list(&group["Tasks"]).filter(|task| task["Driver"] == driver) {
            let own = attributes(&[&task["Constraints"], &task["Affinities"]]);
            // Told once, with the first task that they concern.
            let names = of_group.drain(..).chain(own);
            let mut found = of_task(&task["Config"], plugin);
            found.name = format!("{}.{}", word(&group["Name"]), word(&task["Name"]));
            found.findings.extend(names.map(|name| attribute(&name)));
            found.findings.extend(mbits(&task["Resources"]));
            found.findings.append(&mut of_connect);
            tasks.push(found);
        }
    }
    Checked { tasks }
}

fn of_task(config: &Value, plugin: &Plugin) -> Task {
    let mut task = Task {
        name: String::new(),
        same: Vec::new(),
        unknown: Vec::new(),
        findings: Vec::new(),
    };
    let schema = schema::task();
    let mut known = serde_json::Map::new();
    // By name, whatever order they were written in.
    let options: BTreeMap<_, _> = config.as_object().into_iter().flatten().collect();
    for (option, value) in options {
        if value.is_null() {
            continue;
        }
        let before = task.findings.len();
        let is_row = TASK.row(option).is_some();
        if is_row || TASK.same.contains(&&**option) {
            task.findings.extend(differs(option, value));
        } else {
            let text = format!("`{option}`: Nomad's Docker driver has no such option");
            task.findings.push(Finding::change(text));
            continue;
        }
        let of_group = of_group(option, value);
        let is_unknown = has_variable(value) && !FREE.contains(&&**option) && of_group.is_none();
        if task.findings.len() == before && !is_unknown {
            task.same.push(option.clone());
        }
        let is_refused =
            |row: &crate::config::from_docker::Row| matches!(row.fate, Fate::Refused(_));
        if TASK.row(option).is_some_and(is_refused) {
            continue;
        }
        if is_unknown {
            task.unknown.push(option.clone());
        }
        let volumes = plugin::volumes(option, value).into_iter();
        task.findings
            .extend(volumes.filter(|_| !plugin.volumes).map(Finding::allow));
        match of_group {
            Some(name) => drop(known.insert(option.clone(), format!("task:{name}").into())),
            None if has_variable(value) => {}
            None => drop(known.insert(option.clone(), value.clone())),
        }
    }
    let mut plugin = plugin.clone();
    // A value is there, whatever the node makes of it.
    if config.get("image").is_some_and(has_variable) {
        known.insert("image".into(), "known.on/the/node:1".into());
        if !plugin.allow.images.is_empty() {
            plugin.allow.images.clear();
            task.unknown.push("image".into());
        }
    }
    if let Some(auth) = known.get_mut("auth") {
        without_email(auth);
    }
    let shaped = shape(&schema, &Value::Object(known));
    let msgpack = rmp_serde::to_vec_named(&shaped).unwrap_or_default();
    match Config::parse(&msgpack) {
        Ok(Config::Plain(config)) => {
            let needs = config.not_allowed(&plugin).into_iter();
            task.findings
                .extend(needs.map(|error| Finding::allow(error.to_string())));
        }
        // A task for Nomad's Docker driver has no block `slot`.
        Ok(Config::Slot(_)) => {}
        Err(error) => task.findings.push(Finding::change(chain(&error))),
    }
    task
}

/// It has a finding of its own.
fn without_email(auth: &mut Value) {
    let blocks: &mut [Value] = match auth {
        Value::Array(list) => list,
        one => std::slice::from_mut(one),
    };
    for block in blocks.iter_mut().filter_map(Value::as_object_mut) {
        block.remove("email");
    }
}

/// The rows of the table that are about this value.
fn differs(option: &str, value: &Value) -> Vec<Finding> {
    let below = format!("{option}.");
    let rows = TASK.others.iter().filter(|row| {
        let inner = row.option.strip_prefix(&below);
        match inner {
            Some(inner) => blocks(value).any(|block| !block[inner].is_null()),
            None => row.option == option && concerns(option, value),
        }
    });
    rows.map(|row| {
        let text = format!("`{}`: {}", row.option, row.fate.text());
        let kind = match row.fate {
            Fate::Alias(_) => Kind::Older,
            Fate::Differs(_) if of_group(option, value).is_some() => Kind::Older,
            Fate::Differs(_) if option == "network_mode" => Kind::Change,
            Fate::Differs(_) => Kind::Differs,
            Fate::Refused(_) => Kind::Change,
        };
        Finding { kind, text }
    })
    .collect()
}

/// Whether the difference is one for this value, and is not told by what the plugin's options
/// allow.
fn concerns(option: &str, value: &Value) -> bool {
    let text = value.as_str().unwrap_or_default();
    match option {
        "network_mode" => text.starts_with("container:"),
        "cgroupns" | "ipc_mode" | "pid_mode" | "userns_mode" | "uts_mode" => false,
        "pids_limit" => value.as_f64().is_some_and(|limit| limit <= 0.0),
        "volumes" => list(value).any(|volume| word(volume).starts_with('/')),
        "init" => value == false,
        // What the table says of them is about jobs without them, or is an error of their value.
        "labels" | "logging" | "security_opt" => false,
        _ => true,
    }
}

/// The task of the group whose container a mode names.
pub(super) fn of_group<'v>(option: &str, value: &'v Value) -> Option<&'v str> {
    let container = value.as_str()?.strip_prefix("container:")?;
    let name = container.strip_suffix("-${NOMAD_ALLOC_ID}")?;
    (option.ends_with("_mode") && !name.contains("${")).then_some(name)
}

/// Nomad adds a task of its Docker driver for each sidecar, and two drivers cannot both make the
/// group's network (1.11.3, "only one driver can do so").
fn connect(group: &Value) -> Vec<Finding> {
    let of_tasks = list(&group["Tasks"]).flat_map(|task| list(&task["Services"]));
    let services = list(&group["Services"]).chain(of_tasks);
    let has_sidecar = |service: &&Value| {
        let connect = &service["Connect"];
        let driver = word(&connect["SidecarTask"]["Driver"]);
        let adds = !connect["SidecarService"].is_null() || !connect["Gateway"].is_null();
        adds && matches!(driver, "" | "docker")
    };
    // Nomad has added the tasks of a job that it tells.
    if list(&group["Tasks"]).any(|task| word(&task["Kind"]).starts_with("connect-")) {
        return Vec::new();
    }
    services
        .filter(has_sidecar)
        .map(|service| {
            Finding::change(format!(
                "`connect` of service `{}`: Nomad adds a task with its Docker driver, and all tasks of a group with a network of its own must have one driver: write `sidecar_task` with `driver = \"polydev\"` and a `config`",
                word(&service["Name"])
            ))
        })
        .collect()
}

/// Bookkeeping of older jobs, which Nomad's Docker driver does not enforce either.
fn mbits(resources: &Value) -> Option<Finding> {
    let mut networks = list(&resources["Networks"]);
    let has_mbits =
        networks.any(|network| network["MBits"].as_i64().is_some_and(|mbits| mbits > 0));
    has_mbits.then(|| Finding {
        kind: Kind::Differs,
        text: "`mbits`: limits the task where the plugin sets `enforce_mbits`; `bandwidth` limits it everywhere".into(),
    })
}

/// The attributes of Nomad's Docker driver in these values.
fn attributes(values: &[&Value]) -> Vec<String> {
    let mut names = Vec::new();
    for value in values {
        match value {
            Value::String(text) => names.extend(attribute_of(text).map(str::to_owned)),
            Value::Array(list) => list
                .iter()
                .for_each(|inner| names.extend(attributes(&[inner]))),
            Value::Object(map) => map
                .values()
                .for_each(|inner| names.extend(attributes(&[inner]))),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
    names
}

/// `attr.driver.docker.version` in `${attr.driver.docker.version}`.
pub(super) fn attribute_of(text: &str) -> Option<&str> {
    let (_, name) = text.split_once("${attr.driver.docker")?;
    let name = name.split_once('}')?.0;
    let start = text.find("attr.driver.docker")?;
    let is_whole = name.is_empty() || name.starts_with('.');
    is_whole.then(|| &text[start..start + "attr.driver.docker".len() + name.len()])
}

/// What this driver calls an attribute of Nomad's Docker driver.
pub(super) fn attribute_here(name: &str) -> Option<String> {
    let rest = name.strip_prefix("attr.driver.docker")?;
    let here = match rest {
        ""
        | ".os_type"
        | ".pids.limit"
        | ".privileged.enabled"
        | ".runtimes"
        | ".volumes.enabled" => rest,
        ".version" => ".docker_version",
        _ => return None,
    };
    Some(format!("attr.driver.polydev{here}"))
}

fn attribute(name: &str) -> Finding {
    Finding::change(match attribute_here(name) {
        Some(here) => format!("`${{{name}}}`: write `${{{here}}}`"),
        None => format!("`${{{name}}}`: this driver has no such attribute"),
    })
}

impl Kind {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Differs => "differs",
            Self::Older => "older form",
            Self::Allow => "to allow",
            Self::Change => "to change",
        }
    }
}

impl Finding {
    fn allow(text: String) -> Self {
        let kind = Kind::Allow;
        Self { kind, text }
    }

    fn change(text: String) -> Self {
        let kind = Kind::Change;
        Self { kind, text }
    }
}

fn has_variable(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains("${"),
        Value::Array(list) => list.iter().any(has_variable),
        Value::Object(map) => map.values().any(has_variable),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}
