use std::{path::PathBuf, time::Duration};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{pages::names, *};
use crate::limits::Limits;

fn msgpack(value: &Value) -> Vec<u8> {
    rmp_serde::to_vec_named(value).unwrap()
}

pub(super) fn task(options: &Value) -> Result<Config, Error> {
    Config::parse(&msgpack(options))
}

/// A plain task with these options beside its image.
pub(crate) fn plain(mut options: Value) -> Result<Task, Error> {
    options["image"] = "busybox:1".into();
    task(&options).map(|config| match config {
        Config::Plain(task) => *task,
        Config::Slot(_) => panic!("no slot"),
    })
}

#[test]
fn a_slot_on_demand_is_for_the_run_of_an_id() {
    let slot = |run_id: &str| task(&json!({"slot": {"provider": "openai", "run_id": run_id}}));
    let id = "01890a5d-ac96-774b-bcce-b302099a8057";
    match slot(id).unwrap() {
        Config::Slot(slot) => assert_eq!(slot.run_id, id.parse().ok()),
        Config::Plain(_) => panic!("a slot"),
    }
    let refused = slot("${NOMAD_META_run_id}").unwrap_err().to_string();
    assert!(
        refused.starts_with("`slot.run_id` is `${NOMAD_META_run_id}`: must be the UUIDv7"),
        "{refused}"
    );
    let ahead = json!({"slot": {"provider": "openai", "run_id": id, "prepare_ahead": true}});
    let refused = task(&ahead).unwrap_err().to_string();
    assert!(
        refused.starts_with("`slot.prepare_ahead` is `true`: "),
        "{refused}"
    );
}

#[test]
fn an_upstream_gets_keys_by_tls_alone() {
    let slot = |upstream: serde_json::Value| {
        task(&json!({"slot": {"provider": "openai", "upstream": upstream}}))
    };
    match slot(json!({"base_url": "https://gateway.example/", "headers": [{"x-team": "a"}]})) {
        Ok(Config::Slot(slot)) => {
            let upstream = slot.upstream.expect("it is set");
            assert_eq!(upstream.base_url, "https://gateway.example");
            assert_eq!(upstream.headers["x-team"], "a");
        }
        other => panic!("{other:?}"),
    }
    let none = slot(json!({"base_url": "", "ca_file": "", "headers": [], "proxy": ""}));
    assert!(matches!(none, Ok(Config::Slot(slot)) if slot.upstream.is_none()));
    let proxy = "http://proxy.example:3128";
    for (upstream, field) in [
        (json!({"base_url": "http://gateway.example"}), "base_url"),
        (json!({"proxy": proxy}), "base_url"),
        (
            json!({"base_url": "http://127.0.0.1:80", "proxy": proxy}),
            "proxy",
        ),
        (
            json!({"base_url": "https://a.example", "proxy": "proxy:3128"}),
            "proxy",
        ),
        (
            json!({"base_url": "https://a.example", "ca_file": "ca.pem"}),
            "ca_file",
        ),
        (
            json!({"base_url": "https://a.example", "headers": [{"a b": "c"}]}),
            "headers",
        ),
    ] {
        let refused = slot(upstream).unwrap_err().to_string();
        assert!(
            refused.starts_with(&format!("`slot.upstream.{field}` is ")),
            "{refused}"
        );
    }
}

#[test]
fn what_a_plain_task_leaves_to_the_broker_needs_init_and_a_network_of_its_own() {
    let broker = json!({"provider": "anthropic", "credential_file": "private/key"});
    let given = plain(json!({"broker": broker, "egress": {"allow": []}})).unwrap();
    assert!(given.is_brokered() && given.egress == Some(vec![]));
    let internet = plain(json!({"egress": {"allow": ["internet"]}})).unwrap();
    assert!(!internet.is_brokered());
    for (beside, field) in [
        (json!({"init": false}), "init"),
        (json!({"privileged": true}), "privileged"),
        (json!({"network_mode": "host"}), "network_mode"),
        (json!({"network_mode": "task:other"}), "network_mode"),
        (
            json!({"network_mode": "bridge", "egress": {"allow": []}}),
            "network_mode",
        ),
        (json!({"ports": ["http"], "egress": {"allow": []}}), "ports"),
        (json!({"egress": {"allow": ["a b"]}}), "egress.allow"),
        (
            json!({"broker": {"provider": "anthropic", "credential_file": "secrets/key"}}),
            "broker.credential_file",
        ),
        (
            json!({"broker": {"provider": "a", "credential_file": "private/key"}}),
            "broker.provider",
        ),
    ] {
        let mut options = json!({"broker": broker});
        for (name, value) in beside.as_object().expect("options") {
            options[name] = value.clone();
        }
        let refused = plain(options).unwrap_err().to_string();
        assert!(refused.starts_with(&format!("`{field}` is ")), "{refused}");
    }
}

#[test]
fn a_slots_egress_is_the_internet_or_a_list_and_closed_without_one() {
    let slot = |egress: Value| {
        let config = json!({"slot": {"provider": "anthropic", "egress": egress}});
        match Config::parse(&msgpack(&config)) {
            Ok(Config::Slot(slot)) => Ok(slot.egress),
            Ok(Config::Plain(_)) => panic!("it is a slot"),
            Err(error) => Err(error.to_string()),
        }
    };
    assert_eq!(slot(Value::Null), Ok(Egress::Internet));
    assert_eq!(slot(json!({"allow": ["internet"]})), Ok(Egress::Internet));
    for closed in [json!({}), json!({"allow": null}), json!({"allow": []})] {
        assert_eq!(slot(closed), Ok(Egress::Listed(Vec::new())));
    }
    let rules = ["*.github.com:443".to_owned(), "10.1.0.0/16".to_owned()];
    assert_eq!(
        slot(json!({"allow": rules})),
        Ok(Egress::Listed(rules.into()))
    );
    for (rule, words) in [
        (
            json!(["internet", "10.0.0.0/8"]),
            "`internet`: must be `internet` alone",
        ),
        (
            json!(["https://github.com"]),
            "`https://github.com`: must be",
        ),
        (json!(["10.1.2.3/8"]), "the network is 10.0.0.0/8"),
        (json!(vec!["a.example"; 201]), "at most 200"),
    ] {
        let refused = slot(json!({"allow": rule})).unwrap_err();
        assert!(
            refused.starts_with("`slot.egress.allow` is ") && refused.contains(words),
            "{refused}"
        );
    }
}

#[test]
fn without_a_config_block_the_documented_defaults_hold() {
    let config = Plugin::parse(&[]).unwrap();
    assert_eq!(config.endpoint.address, "unix:///var/run/docker.sock");
    assert_eq!(config.state_dir, PathBuf::from("/var/lib/polydev"));
    assert_eq!(config.run, Limits::RUN);
    assert!(!config.volumes && !config.allow.privileged);
    assert_eq!(config.allow.caps.len(), 13);
    assert_eq!(config.gc.image_delay, Duration::from_secs(180));
}

/// The shapes in which go-cty sends numbers and absent values.
#[test]
fn nils_and_numbers_of_every_form_are_understood() {
    for cpu in ["cd01f4", "cb407f400000000000", "a3353030"] {
        let bytes = format!(
            "84a8656e64706f696e74c0a9696e69745f70617468c0a972756e5f636c617373\
             84a3637075{cpu}a56d62697473c0a66d656d6f7279c0a470696473c0a973746174655f646972c0"
        );
        let config = Plugin::parse(&hex::decode(bytes).unwrap()).unwrap();
        assert_eq!(config.run.cpu_mhz, 500);
    }
}

#[test]
fn plugin_values_out_of_range_are_refused_by_name() {
    let check = |config: Value, field: &str| {
        let error = Plugin::parse(&msgpack(&config)).unwrap_err().to_string();
        assert!(error.contains(&format!("`{field}`")), "{error}");
    };
    check(json!({"endpoint": "ssh://1.2.3.4"}), "endpoint");
    for network in [
        "10.1.2.3/8",
        "10.0.0.0",
        "fd00::/8",
        "0.0.0.0/0",
        "169.254.0.0/16",
    ] {
        check(json!({"private_networks": [network]}), "private_networks");
    }
    let shims = |name: &str, value: Value| {
        let mut shims = json!({
            "listen": "192.0.2.1:7646", "cert": "/a", "key": "/b", "ca": "/c", "allow": ["cn:shim"],
        });
        shims[name] = value;
        json!({ "shims": shims })
    };
    for listen in ["", "192.0.2.1", "node:7646"] {
        check(shims("listen", listen.into()), "shims.listen");
    }
    check(shims("listen", "0.0.0.0:7646".into()), "shims.advertise");
    for advertise in ["http://node:7646", "https://node", "https://node:7646/x"] {
        check(shims("advertise", advertise.into()), "shims.advertise");
    }
    check(shims("key", "relative.pem".into()), "shims.key");
    for endpoint in [
        "",
        "127.0.0.1:4317",
        "http://collector",
        "http://c:4317/v1",
        "http://::1:4317",
        "http://a b:4317",
        "http://#:4317",
    ] {
        let telemetry = json!({ "telemetry": { "otlp_endpoint": endpoint } });
        check(telemetry, "telemetry.otlp_endpoint");
    }
    for interval in ["10ms", "2m"] {
        let telemetry = json!({ "otlp_endpoint": "http://[::1]:4317", "interval": interval });
        check(json!({ "telemetry": telemetry }), "telemetry.interval");
    }
    check(shims("allow", json!([])), "shims.allow");
    check(json!({"log_path": "syslog"}), "log_path");
    check(json!({"socket_group": "no such group"}), "socket_group");
    check(
        json!({"endpoint": "unix:///x", "tls": {"cert": "/a", "key": "/b", "ca": "/c"}}),
        "endpoint",
    );
    check(
        json!({"endpoint": "tcp://x:1", "tls": {"cert": "a", "key": "/b", "ca": "/c"}}),
        "tls.cert",
    );
    check(json!({"state_dir": "relative"}), "state_dir");
    check(
        json!({"state_dir": format!("/{}", "x".repeat(60))}),
        "state_dir",
    );
    check(json!({"init_path": "init"}), "init_path");
    check(json!({"run_class": {"cpu": 0}}), "run_class.cpu");
    check(json!({"run_class": {"memory": 1.5}}), "run_class.memory");
    check(json!({"python_class": {"pids": 1}}), "python_class.pids");
    let boost = json!({"run_class": {"start_boost": {"cpu": 900}}});
    check(boost, "run_class.start_boost");
    check(json!({"run_headroom": {"cpu": 100}}), "run_headroom.memory");
    check(
        json!({"run_headroom": {"cpu": -1, "memory": 1}}),
        "run_headroom.cpu",
    );
    check(json!({"pids_limit": 0}), "pids_limit");
    check(json!({"image_pull_timeout": "soon"}), "image_pull_timeout");
    check(
        json!({"pull_activity_timeout": "30s"}),
        "pull_activity_timeout",
    );
    check(json!({"gc": {"image_delay": "-1s"}}), "gc.image_delay");
    check(
        json!({"gc": {"dangling_containers": {"creation_grace": "1s"}}}),
        "gc.dangling_containers.creation_grace",
    );
    check(
        json!({"volumes": {"selinuxlabel": "x"}}),
        "volumes.selinuxlabel",
    );
    check(json!({"auth": {"helper": "/bin/sh"}}), "auth.helper");
    check(json!({"volumes": {"enabled": "maybe"}}), "volumes.enabled");
    check(json!({"unheard_of": 1}), "unheard_of");
}

#[test]
fn a_slot_for_scripts_has_no_model_no_network_and_modules() {
    let slot = |mut slot: Value| {
        slot["provider"] = "python".into();
        match task(&json!({ "slot": slot })) {
            Ok(Config::Slot(slot)) => Ok(slot),
            Ok(Config::Plain(_)) => panic!("it is a slot"),
            Err(error) => Err(error.to_string()),
        }
    };
    let usual = slot(json!({})).unwrap();
    assert_eq!(usual.image, "polydev-python-sandbox:latest");
    assert_eq!(usual.egress, Egress::Listed(Vec::new()));
    assert!(usual.imports.contains(&"pandas".to_owned()));
    let few = slot(json!({"imports": ["numpy.linalg"]})).unwrap();
    assert_eq!(few.imports, ["numpy.linalg"]);
    for (wrong, words) in [
        (
            json!({"imports": ["os; x"]}),
            "`slot.imports` is `os; x`: must be names of modules",
        ),
        (
            json!({"imports": vec!["a"; 101]}),
            "`slot.imports` is `a list of 101`: must have at most 100",
        ),
        (
            json!({"upstream": {"base_url": "https://a.example"}}),
            "`slot.upstream` is `https://a.example`: must be absent",
        ),
    ] {
        let refused = slot(wrong).unwrap_err();
        assert!(refused.starts_with(words), "{refused}");
    }
    let of_cli = task(&json!({"slot": {"provider": "openai", "imports": ["numpy"]}}));
    let refused = of_cli.unwrap_err().to_string();
    assert!(
        refused.starts_with("`slot.imports` is `numpy`"),
        "{refused}"
    );
}

#[test]
fn a_task_is_a_slot_or_has_an_image() {
    let slot =
        task(&json!({"slot": {"provider": "google", "image": null}, "args": [], "image": null}));
    let Config::Slot(slot) = slot.unwrap() else {
        panic!("a slot")
    };
    assert_eq!(slot.image, "polydev-google-runtime:latest");
    let error = |options| task(&options).unwrap_err().to_string();
    let wrong = error(json!({"slot": {"provider": "codex"}}));
    assert!(wrong.contains("`slot.provider` is `codex`"), "{wrong}");
    let both = error(json!({"slot": {"provider": "google"}, "command": "sh"}));
    assert!(both.contains("`command` is set next to `slot`"), "{both}");
    for image in [json!(null), json!(""), json!("a b"), json!("busybox:")] {
        let none = error(json!({"slot": null, "image": image}));
        assert!(none.contains("image name required"), "{none}");
    }
    assert_eq!(
        plain(json!({"image": "https://busybox:1"})).unwrap().image,
        "busybox:1"
    );
}

#[test]
fn what_an_operator_writes_becomes_what_docker_is_told() {
    let task = plain(json!({
        "entrypoint": "sh", "args": ["-c", "id"], "ulimit": [{"nofile": "2048:4096", "core": "-1"}],
        "sysctl": [{"net.core.somaxconn": "16384"}, {"a": "b"}], "volumes": ["a:/b", "/c:/d:ro"],
        "mount": [{"type": "tmpfs", "target": "/t", "tmpfs_options": {"size": "1000", "mode": null}}],
        "devices": [{"host_path": "/dev/null"}], "labels": [{"x": "y"}], "cpu_cfs_period": 50000,
        "logging": {"driver": "journald", "type": "syslog"},
    }))
    .unwrap();
    assert_eq!(task.entrypoint.unwrap(), ["sh"]);
    assert_eq!(task.cpu_cfs_period, Duration::from_millis(50));
    let [core, nofile] = &task.ulimits[..] else {
        panic!("two")
    };
    assert_eq!((core.soft, core.hard), (-1, -1));
    assert_eq!((nofile.soft, nofile.hard), (2048, 4096));
    assert_eq!(task.sysctl.len(), 2);
    assert_eq!(task.volumes[1].options, "ro");
    assert_eq!(
        task.mounts[0].kind,
        MountKind::Tmpfs {
            size: Some(1000),
            mode: None
        }
    );
    assert_eq!(task.devices[0].container_path, "/dev/null");
    assert_eq!(task.devices[0].permissions, "rwm");
    assert_eq!(task.logging.unwrap().driver, "syslog", "`type` wins");
    assert_eq!(task.init, None);
}

#[test]
fn task_values_that_make_no_sense_are_refused_by_name() {
    let check = |options: Value, field: &str| {
        let error = crate::chain(&plain(options).unwrap_err());
        assert!(error.contains(&format!("`{field}`")), "{error}");
    };
    check(json!({"command": ""}), "command");
    check(json!({"port_map": [{"http": 70_000}]}), "port_map.http");
    check(
        json!({"ports": ["http"], "port_map": [{"http": 80}]}),
        "port_map",
    );
    check(json!({"ipv4_address": "fd00::1"}), "ipv4_address");
    check(json!({"ipv6_address": "10.0.0.1"}), "ipv6_address");
    for mac in ["02:42:ac:11:00", "02:42:ac:11:00:zz", "0242ac110002"] {
        check(json!({ "mac_address": mac }), "mac_address");
    }
    check(json!({"command": " sh"}), "command");
    check(json!({"args": "sh"}), "args");
    check(json!({"entrypoint": 1}), "entrypoint");
    check(json!({"image_pull_timeout": "0s"}), "image_pull_timeout");
    check(json!({"cpu_cfs_period": 1_000_001}), "cpu_cfs_period");
    check(json!({"memory_hard_limit": -1}), "memory_hard_limit");
    for wrong in ["", ":4096", "2048:", "abc", "4096:2048"] {
        check(json!({"ulimit": [{"nofile": wrong}]}), "ulimit.nofile");
    }
    check(
        json!({"bandwidth": {"egress_mbits": 0}}),
        "bandwidth.egress_mbits",
    );
    check(
        json!({"bandwidth": {"ingress_mbits": 40_000}}),
        "bandwidth.ingress_mbits",
    );
    check(json!({"oom_score_adj": 2000}), "oom_score_adj");
    check(json!({"cgroupns": "x"}), "cgroupns");
    check(json!({"volumes": ["/a"]}), "volumes");
    check(json!({"volumes": [":/a"]}), "volumes");
    check(json!({"volumes": ["/a:b"]}), "volumes");
    check(json!({"volumes": ["/a:/x", "/b:/x"]}), "volumes");
    check(json!({"volumes": ["/a:/.polydev/init"]}), "volumes");
    check(
        json!({"mount": [{"type": "nfs", "target": "/x"}]}),
        "mount.type",
    );
    check(
        json!({"mount": [{"type": "bind", "target": "/x"}]}),
        "mount.source",
    );
    check(
        json!({"mount": [{"type": "bind", "source": "a", "target": "/x", "tmpfs_options": {}}]}),
        "mount.type",
    );
    check(json!({"mount": [{"target": "x"}]}), "mount.target");
    check(
        json!({"devices": [{"host_path": "null"}]}),
        "devices.host_path",
    );
    check(
        json!({"devices": [{"host_path": "/dev/null", "cgroup_permissions": "rx"}]}),
        "devices.cgroup_permissions",
    );
    check(json!({"dns_servers": ["localhost"]}), "dns_servers");
    check(json!({"extra_hosts": ["a"]}), "extra_hosts");
    check(json!({"labels": [{"dev.polydev.task": "x"}]}), "labels");
    check(
        json!({"labels": [{"com.hashicorp.nomad.alloc_id": "x"}]}),
        "labels",
    );
}

/// Anything that a serialiser could have written, and any bytes at all.
fn any_msgpack() -> impl Strategy<Value = Vec<u8>> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z:/0-9]{0,12}".prop_map(Value::from),
    ];
    let options = schema_names();
    let value = leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("[a-z]{1,6}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    });
    let config = prop::collection::hash_map(prop::sample::select(options), value, 0..6)
        .prop_map(|map| msgpack(&Value::Object(map.into_iter().collect())));
    prop_oneof![config, prop::collection::vec(any::<u8>(), 0..200)]
}

fn schema_names() -> Vec<String> {
    let all = names(schema::plugin()).into_iter();
    let all = all.chain(names(schema::task()));
    all.filter(|name| !name.contains('.')).collect()
}

proptest! {
    #[test]
    fn any_configuration_is_taken_or_refused_with_a_name(bytes in any_msgpack()) {
        for error in [Plugin::parse(&bytes).err(), Config::parse(&bytes).err()].into_iter().flatten() {
            prop_assert!(error.to_string().contains('`'), "{}", error);
        }
    }
}
