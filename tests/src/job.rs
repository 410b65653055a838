//! Jobs with one plain task, as the HTTP API takes them.

use serde_json::{Value, json};

/// The image of plain tasks: busybox, root and a user called `user`.
pub const IMAGE: &str = "polydev-busybox:1";

/// A job that runs once. Its one task is called `task`; the task's options include `config`.
#[must_use]
pub fn batch(id: &str, config: Value) -> Value {
    let mut job = service(id, config);
    job["Type"] = "batch".into();
    job["Update"] = Value::Null;
    job["TaskGroups"][0]["ReschedulePolicy"] = json!({ "Attempts": 0, "Unlimited": false });
    job
}

/// A job that runs until it is stopped.
#[must_use]
pub fn service(id: &str, config: Value) -> Value {
    let mut options = json!({ "image": IMAGE });
    merge(&mut options, config);
    json!({
        "ID": id, "Name": id, "Type": "service", "Datacenters": ["*"],
        "Update": { "MinHealthyTime": 0 },
        "TaskGroups": [{
            "Name": "group", "Count": 1,
            "EphemeralDisk": { "SizeMB": 300 },
            "RestartPolicy": { "Attempts": 0, "Mode": "fail" },
            "Tasks": [{
                "Name": "task", "Driver": "polydev", "Config": options,
                "Resources": { "CPU": 100, "MemoryMB": 64 },
                "LogConfig": { "MaxFiles": 3, "MaxFileSizeMB": 50 },
            }],
        }],
    })
}

/// `sh -c script` as the command of [`batch`] and [`service`].
#[must_use]
pub fn shell(script: &str) -> Value {
    json!({ "command": "sh", "args": ["-c", script] })
}

/// Adds the options of `other`. They override existing ones.
pub fn merge(into: &mut Value, other: Value) {
    match (into, other) {
        (Value::Object(into), Value::Object(other)) => {
            for (key, value) in other {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, other) => *into = other,
    }
}

/// The task of a job that [`batch`] or [`service`] made.
pub fn task(job: &mut Value) -> &mut Value {
    &mut job["TaskGroups"][0]["Tasks"][0]
}

/// An allocation's id.
///
/// # Panics
/// If `alloc` is not an allocation of the API.
#[must_use]
pub fn id(alloc: &Value) -> &str {
    alloc["ID"].as_str().expect("an allocation has an id")
}

/// The events of an allocation's tasks as the operator reads them: one line for each event.
#[must_use]
pub fn events(alloc: &Value) -> String {
    let tasks = alloc["TaskStates"].as_object();
    let events = tasks.into_iter().flat_map(|tasks| tasks.values());
    let events = events.filter_map(|task| task["Events"].as_array());
    let line = |event: &Value| {
        let text = event["DisplayMessage"].as_str().unwrap_or_default();
        format!("{}: {text}\n", event["Type"].as_str().unwrap_or_default())
    };
    events.flatten().map(line).collect()
}
