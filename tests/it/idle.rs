//! Idle containers outlive their driver. The next driver takes over those that it would make in
//! the same way.

use std::{fs, time::Duration};

use polydev_tests::{
    client::{Client, shell},
    docker,
    nomad::Nomad,
    shim::instance_label,
    wait_until,
};
use serde_json::Value;

use crate::{leases, survive::kill_driver};

/// Changes one field in the record of each of some idle containers. Returns those containers.
fn alter_idle(nomad: &Nomad, fields: &[(&str, Value)]) -> Vec<String> {
    let records = fs::read_dir(nomad.state_dir().join("idle")).expect("a driver keeps records");
    let altered = records.zip(fields).map(|(file, (field, value))| {
        let path = file.expect("a folder can be read").path();
        let text = fs::read(&path).expect("a record can be read");
        let mut record: Value = serde_json::from_slice(&text).expect("a record is JSON");
        let now = record.pointer_mut(field).expect("a record has the field");
        assert_ne!(now, value);
        *now = value.clone();
        fs::write(&path, record.to_string()).expect("a record can be written");
        let container = record["occupant"]["container"].as_str();
        container.expect("a record has its container").to_owned()
    });
    altered.collect()
}

/// Needs a pool of five idle slots.
pub(crate) fn are_taken_up_if_they_would_be_made_so(nomad: &Nomad, client: &Client) {
    // The next driver takes over an idle container. It serves one claim; then the slot has another.
    let label = instance_label(&nomad.state_dir());
    // The next driver does not take over the container of a lease: a caller knows its public key.
    let idle = docker::wait_containers(&label, 5);
    leases::allocate(client, 300).expect("a slot is idle");
    kill_driver(nomad);
    client.wait_idle("anthropic", 5);
    let now = docker::wait_containers(&label, 5);
    let kept = now.iter().filter(|id| idle.contains(id)).count();
    assert_eq!(kept, 4, "of {idle:?} in {now:?}");
    let outcome = client
        .run(shell("anthropic", "echo again"))
        .expect("a whole run");
    assert_eq!(outcome.stdout(), "again\n");
    client.wait_idle("anthropic", 5);
    let still = docker::wait_containers(&label, 5);
    let kept = still.iter().filter(|id| now.contains(id)).count();
    assert_eq!(kept, 4, "of {now:?} in {still:?}");

    // A driver with another init takes over no container.
    nomad.upgrade();
    kill_driver(nomad);
    let others = || {
        let now = docker::containers(&label);
        if now.len() == 5 && now.iter().all(|id| !still.contains(id)) {
            Ok(())
        } else {
            Err(format!("of {still:?} in {now:?}"))
        }
    };
    wait_until("other containers", Duration::from_secs(60), others);
    client.wait_idle("anthropic", 5);

    // Nor does a driver take over a container of another version, or with other names or limits.
    let altered = alter_idle(
        nomad,
        &[
            ("/made/version", "0.0.1".into()),
            ("/made/resolv_conf", "nameserver 192.0.2.1\n".into()),
            ("/made/limits/pids", 63.into()),
        ],
    );
    let before = docker::containers(&label);
    kill_driver(nomad);
    let replaced = || {
        let now = docker::containers(&label);
        let is_as_it_should = |id: &String| now.contains(id) != altered.contains(id);
        if now.len() == 5 && before.iter().all(is_as_it_should) {
            Ok(())
        } else {
            Err(format!("{altered:?} of {before:?} in {now:?}"))
        }
    };
    wait_until("three other containers", Duration::from_secs(60), replaced);
    client.wait_idle("anthropic", 5);
    let outcome = client
        .run(shell("anthropic", "echo anew"))
        .expect("a whole run");
    assert_eq!(outcome.stdout(), "anew\n");
}
