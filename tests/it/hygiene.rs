//! What `polydev-shim images` lists and removes, on a node with a dockerd of its own.

use std::fs;

use polydev_tests::{
    engine::Engine,
    fresh_key,
    job::{merge, service, shell},
    nomad::Nomad,
    process::succeed,
    shim::Shim,
};
use serde_json::{Value, json};

/// Makes an image with a label. Returns its id.
fn labelled(engine: &Engine, label: &str, tags: &[&str]) -> String {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let base = polydev_tests::job::IMAGE;
    let file = format!("FROM {base}\nLABEL {label}=\"{}\"\n", fresh_key());
    fs::write(folder.path().join("Dockerfile"), file).expect("a file can be written");
    let context = folder.path().to_str().expect("it is text");
    let mut arguments = vec!["build", "--quiet"];
    arguments.extend(tags.iter().flat_map(|tag| ["--tag", tag]));
    arguments.push(context);
    engine.docker(&arguments).trim().to_owned()
}

#[test]
fn images_that_nothing_uses_are_shown_and_then_removed_and_no_others() {
    let engine = Engine::start();
    let dangling = labelled(&engine, "dev.polydev.test", &[]);
    let tagged = labelled(&engine, "dev.polydev.test", &["ours:1", "ours:2"]);
    let stopped = labelled(&engine, "dev.polydev.test", &[]);
    let running = labelled(&engine, "dev.polydev.test", &["task:1"]);
    let foreign = labelled(&engine, "example.test", &["others:1"]);
    engine.docker(&["create", "--network=none", &stopped, "true"]);

    let socket = engine.socket();
    let nomad = Nomad::start_with(&format!("endpoint = \"unix://{}\"", socket.display()));
    let mut config = shell("sleep 600");
    merge(
        &mut config,
        json!({ "image": "task:1", "network_mode": "none" }),
    );
    nomad.submit(&service("user", config));
    nomad.wait_started("user");
    let shim = Shim::serve(&nomad.address);
    polydev_tests::wait_until("the node", std::time::Duration::from_secs(30), || {
        let told = succeed(&mut shim.command(&["images", "list"]));
        told.contains("task:1").then_some(()).ok_or(told)
    });
    let found = |arguments: &[&str]| -> Vec<Value> {
        let mut command = shim.command(&[&["images"], arguments, &["--output", "json"]].concat());
        let node: Value = serde_json::from_str(&succeed(&mut command)).unwrap();
        // Docker 20.10 does not say what an image shares.
        assert_eq!(
            node["reclaimed_bytes"].as_u64().unwrap_or_default(),
            0,
            "{node}"
        );
        node["images"].as_array().unwrap().clone()
    };
    let ids = |images: &[Value]| -> Vec<String> {
        let mut ids: Vec<_> = (images.iter())
            .map(|image| image["image_id"].as_str().unwrap().to_owned())
            .collect();
        ids.sort();
        ids
    };
    let sorted = |expected: &[&String]| -> Vec<String> {
        let mut expected: Vec<String> = expected.iter().copied().cloned().collect();
        expected.sort();
        expected
    };

    let listed = found(&["list"]);
    let all = [&dangling, &tagged, &stopped, &running];
    assert_eq!(ids(&listed), sorted(&all));
    for image in &listed {
        let is_used = [&stopped, &running]
            .iter()
            .any(|id| image["image_id"] == **id);
        assert_eq!(image["in_use"], is_used, "{image}");
    }

    // A dry run changes nothing.
    assert_eq!(ids(&found(&["prune"])), sorted(&[&dangling]));
    assert_eq!(
        ids(&found(&["prune", "--all"])),
        sorted(&[&dangling, &tagged])
    );
    assert_eq!(ids(&found(&["list"])), sorted(&all));

    assert_eq!(ids(&found(&["prune", "--yes"])), sorted(&[&dangling]));
    let left = sorted(&[&tagged, &stopped, &running]);
    assert_eq!(ids(&found(&["list"])), left);
    assert_eq!(
        ids(&found(&["prune", "--all", "--yes"])),
        sorted(&[&tagged])
    );
    assert_eq!(ids(&found(&["list"])), sorted(&[&stopped, &running]));
    assert!(found(&["prune", "--all", "--yes"]).is_empty());
    let tags = engine.docker(&["image", "ls", "--format", "{{.Repository}}:{{.Tag}}"]);
    assert!(!tags.contains("ours:"), "{tags}");
    assert!(
        engine
            .docker(&["image", "inspect", &foreign])
            .contains("example.test")
    );
}
