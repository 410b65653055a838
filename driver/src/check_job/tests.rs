use serde_json::{Value, json};

use super::{findings, plugin, rewrite};
use crate::config::Plugin;

/// A job with one task.
fn job(config: Value) -> Value {
    json!({
        "ID": "j",
        "TaskGroups": [{
            "Name": "g",
            "Networks": [{"DynamicPorts": [{"Label": "http", "To": 0}]}],
            "Tasks": [{"Name": "t", "Driver": "docker", "Config": config}],
        }],
    })
}

/// A plugin without options.
fn nothing() -> Plugin {
    plugin::options(&[]).unwrap()
}

fn printed(job: &Value) -> String {
    let mut text = Vec::new();
    super::print(&mut text, &findings::check(job, &nothing()).unwrap()).unwrap();
    String::from_utf8(text).unwrap()
}

#[test]
fn a_job_that_needs_no_change_says_so() {
    let job = job(json!({
        "image": "redis:${NOMAD_META_tag}", "args": ["--port", "${NOMAD_PORT_db}"],
        "ports": ["http"], "logging": [{"type": "json-file", "config": [{"max-file": 2}]}],
        "ulimit": {"nofile": "1024"}, "dns_servers": ["${attr.unique.network.ip-address}"],
        "mount": [{"type": "tmpfs", "target": "/t", "tmpfs_options": [{"size": "1000"}]}],
    }));
    let checked = findings::check(&job, &nothing()).unwrap();
    assert!(checked.is_ready(), "{checked:?}");
    assert_eq!(checked.tasks[0].unknown, ["dns_servers"]);
    assert_eq!(checked.tasks[0].findings, []);
    assert!(printed(&job).contains("Runs with `driver = \"polydev\"`, if the node allows"));
}

#[test]
fn each_option_that_is_not_the_same_is_named_with_what_to_write() {
    let job = job(json!({
        "image": "app:1", "isolation": "default", "cpuset_cpus": "0-1",
        "auth": [{"username": "u", "password": "p", "email": "e"}],
        "network_mode": "container:front-${NOMAD_ALLOC_ID}", "port_map": [{"http": 80}],
        "volumes": ["/srv/x:/x"], "pids_limit": 100, "labels": [{"dev.polydev.x": "1"}],
        "no_such_option": true,
    }));
    let text = printed(&job);
    for line in [
        "  to change    `isolation`: it is for Windows",
        "  to change    `cpuset_cpus`: Nomad's Docker driver ignores it",
        "  to change    `auth.email`: ",
        "  older form   `network_mode`: ",
        "  older form   `port_map`: write `ports`",
        "  differs      `volumes`: ",
        "  to allow     `volumes` is `/srv/x:/x`: a folder of the host",
        "  to change    `no_such_option`: ",
        "  to change    `labels` is `dev.polydev.x`: ",
        "  the same     image, labels, pids_limit",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    assert!(
        text.contains("6 things must be changed or allowed first"),
        "{text}"
    );
}

#[test]
fn a_rewritten_job_has_this_driver_and_its_forms() {
    let mut job = job(json!({
        "image": "app:1", "isolation": "default", "container_exists_attempts": 3,
        "auth": [{"username": "u", "email": "e"}], "port_map": [{"http": 80}],
        "network_mode": "container:my-vpn-${NOMAD_ALLOC_ID}",
        "mounts": [{"type": "tmpfs", "target": "/a"}], "mount": {"type": "tmpfs", "target": "/b"},
    }));
    job["Constraints"] = json!([
        {"LTarget": "${attr.driver.docker.version}", "RTarget": "20", "Operand": "semver"},
    ]);
    rewrite::rewrite(&mut job);
    let group = &job["TaskGroups"][0];
    let (task, config) = (&group["Tasks"][0], &group["Tasks"][0]["Config"]);
    assert_eq!(task["Driver"], "polydev");
    assert_eq!(
        *config,
        json!({
            "image": "app:1", "auth": [{"username": "u"}], "ports": ["http"],
            "network_mode": "task:my-vpn",
            "mount": [{"type": "tmpfs", "target": "/b"}, {"type": "tmpfs", "target": "/a"}],
        })
    );
    assert_eq!(group["Networks"][0]["DynamicPorts"][0]["To"], 80);
    assert_eq!(
        job["Constraints"][0]["LTarget"],
        "${attr.driver.polydev.docker_version}"
    );
    assert!(findings::check_rewritten(&job, &nothing()).is_ready());
}

#[test]
fn a_port_map_that_the_group_does_not_have_stays() {
    let mut job = job(json!({"image": "app:1", "port_map": [{"http": 80, "admin": 81}]}));
    rewrite::rewrite(&mut job);
    let config = &job["TaskGroups"][0]["Tasks"][0]["Config"];
    assert_eq!(config["port_map"], json!([{"http": 80, "admin": 81}]));
}

#[test]
fn what_cannot_be_changed_by_itself_is_left_and_told() {
    let mut job = job(json!({"image": "app:1", "network_mode": "container:other"}));
    job["Constraints"] = json!([{"LTarget": "${attr.driver.docker.bridge_ip}"}]);
    rewrite::rewrite(&mut job);
    assert_eq!(findings::check_rewritten(&job, &nothing()).changes(), 2);
}

#[test]
fn what_the_operator_must_allow_is_told_until_it_is_allowed() {
    for (option, value, allowed) in [
        ("privileged", json!(true), "allow_privileged=true"),
        ("runtime", json!("kata"), "allow_runtimes=[\"kata\"]"),
        (
            "cap_add",
            json!(["net_admin", "sys_admin"]),
            "allow_caps=[\"all\"]",
        ),
        ("pid_mode", json!("host"), "allowed_modes.pid=[\"host\"]"),
        ("ipc_mode", json!("task:other"), "allow_privileged=true"),
        (
            "pid_mode",
            json!("container:other-${NOMAD_ALLOC_ID}"),
            "allowed_modes.pid=[\"task:*\"]",
        ),
        (
            "volumes",
            json!(["/srv/${NOMAD_JOB_NAME}:${NOMAD_META_there}", "local/x:/x"]),
            "volumes.enabled=true",
        ),
        (
            "mount",
            json!({"type": "bind", "source": "/srv/${NOMAD_JOB_NAME}", "target": "/srv"}),
            "volumes.enabled=true",
        ),
        ("pids_limit", json!(10_000), "pids_limit=10000"),
        ("volumes", json!(["/srv:/srv"]), "volumes.enabled=true"),
        (
            "mount",
            json!({"type": "volume", "target": "/a", "source": "v"}),
            "volumes.enabled=true",
        ),
        ("volume_driver", json!("pxd"), "volumes.enabled=true"),
    ] {
        let job = job(json!({"image": "app:1", option: value}));
        let checked = findings::check(&job, &nothing()).unwrap();
        let kinds: Vec<_> = checked.tasks[0]
            .findings
            .iter()
            .map(|one| one.kind)
            .collect();
        assert_eq!(checked.changes(), 1, "{option}: {checked:?}");
        assert!(
            kinds.contains(&findings::Kind::Allow),
            "{option}: {checked:?}"
        );
        let plugin = plugin::options(&[allowed.to_owned()]).unwrap();
        let checked = findings::check(&job, &plugin).unwrap();
        assert!(checked.is_ready(), "{option}: {checked:?}");
    }
}

/// The name of an image that only the node knows may be one that the operator allows.
#[test]
fn an_image_with_a_variable_is_not_checked() {
    let job = job(json!({"image": "reg/${NOMAD_META_name}:1"}));
    let plugin = plugin::options(&["allow_images=[\"reg/*\"]".to_owned()]).unwrap();
    let checked = findings::check(&job, &plugin).unwrap();
    assert!(checked.is_ready(), "{checked:?}");
    assert_eq!(checked.tasks[0].unknown, ["image"]);
}

#[test]
fn options_of_the_plugin_are_named_if_they_are_wrong() {
    for (given, words) in [
        ("volumes.enabled", "must be NAME=VALUE"),
        ("volumes.on=true", "the plugin has no option `volumes.on`"),
        (
            "volumes=true",
            "the plugin has no option `volumes` with a value",
        ),
        ("allow=true", "the plugin has no option `allow`"),
        ("volumes.enabled=perhaps", "must be true or false"),
        ("allow_caps=all", "must be a list, such as [\"all\"]"),
        ("pids_limit=many", "must be a number"),
    ] {
        let error = plugin::options(&[given.to_owned()]).unwrap_err();
        assert!(format!("{error:#}").contains(words), "{error:#}");
    }
}

#[test]
fn a_sidecar_of_connect_must_have_the_same_driver() {
    let mut job = job(json!({"image": "app:1"}));
    let connect = |driver| json!([{"Name": "api", "Connect": {"SidecarService": {}, "SidecarTask": {"Driver": driver}}}]);
    job["TaskGroups"][0]["Services"] = connect("");
    let text = printed(&job);
    assert!(
        text.contains("  to change    `connect` of service `api`: "),
        "{text}"
    );
    job["TaskGroups"][0]["Services"] = json!([{"Name": "in", "Connect": {"Gateway": {}}}]);
    assert_eq!(findings::check(&job, &nothing()).unwrap().changes(), 1);
    job["TaskGroups"][0]["Services"] = connect("polydev");
    assert!(findings::check(&job, &nothing()).unwrap().is_ready());
}

#[test]
fn a_job_without_a_docker_task_is_an_error() {
    let mut other = job(json!({"image": "app:1"}));
    other["TaskGroups"][0]["Tasks"][0]["Driver"] = "exec".into();
    assert!(findings::check(&other, &nothing()).is_err());
}
