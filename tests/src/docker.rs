//! Docker as a person uses it: the command line.

use std::{process::Command, time::Duration};

use serde_json::Value;

use crate::process::succeed;

/// Docker's own client: `PATH` may name another `docker` first.
#[must_use]
pub fn command() -> Command {
    let debian = "/usr/bin/docker";
    Command::new(if std::path::Path::new(debian).exists() {
        debian
    } else {
        "docker"
    })
}

/// Runs `docker ARGS`, which must succeed.
#[track_caller]
pub fn docker(args: &[&str]) -> String {
    succeed(command().args(args))
}

/// Ids of all containers with a label.
#[must_use]
pub fn containers(label: &str) -> Vec<String> {
    let filter = format!("label={label}");
    let ids = docker(&["ps", "--all", "--quiet", "--no-trunc", "--filter", &filter]);
    ids.lines().map(str::to_owned).collect()
}

/// Waits until `count` containers have the label, and returns their ids. A slot can be idle again
/// before Docker has removed its previous container.
#[track_caller]
pub fn wait_containers(label: &str, count: usize) -> Vec<String> {
    let what = format!("{count} containers");
    crate::wait_until(&what, Duration::from_secs(20), || {
        let now = containers(label);
        if now.len() == count {
            Ok(now)
        } else {
            Err(format!("{now:?}"))
        }
    })
}

/// The output of `docker inspect` for a container.
#[must_use]
pub fn inspect(id: &str) -> Value {
    let text = docker(&["inspect", id]);
    let list: Value = serde_json::from_str(&text).expect("docker inspect prints JSON");
    list[0].clone()
}
