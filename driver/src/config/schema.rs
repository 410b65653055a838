//! The schemas in hclspec, Nomad's own schema language. Nomad rejects unknown options by
//! name before the driver sees them. `docs/options.md` lists the same options; a test
//! compares the two.

use std::collections::BTreeMap;

use polydev_proto::hclspec::{Attr, Block, BlockAttrs, BlockList, Object, Spec, spec};

const STRINGS: &str = "list(string)";
/// Accepts `name { key = "value" }` and `name = [{ key = "value" }]`.
const MAPS: &str = "list(map(string))";

/// Options of `plugin "nomad-driver-polydev" { config { ... } }`.
#[must_use]
pub fn plugin() -> Spec {
    object(vec![
        attr("endpoint", "string"),
        block(
            "tls",
            vec![
                required("cert", "string"),
                required("key", "string"),
                required("ca", "string"),
            ],
        ),
        block(
            "shims",
            vec![
                required("listen", "string"),
                attr("advertise", "string"),
                required("cert", "string"),
                required("key", "string"),
                required("ca", "string"),
                attr("crl", "string"),
                required("allow", STRINGS),
            ],
        ),
        block(
            "telemetry",
            vec![
                attr("otlp_endpoint", "string"),
                attr("otlp_protocol", "string"),
                attr("otlp_ca", "string"),
                attr("otlp_headers_file", "string"),
                attr("interval", "string"),
                attr("metrics_listen", "string"),
            ],
        ),
        block("execution_tokens", vec![required("keys", "string")]),
        attr("socket_group", "string"),
        attr("state_dir", "string"),
        attr("init_path", "string"),
        attr("broker_path", "string"),
        attr("broker_uid", "number"),
        block(
            "run_class",
            vec![
                attr("cpu", "number"),
                attr("memory", "number"),
                attr("mbits", "number"),
                attr("pids", "number"),
                block(
                    "start_boost",
                    vec![required("cpu", "number"), attr("time", "string")],
                ),
            ],
        ),
        block(
            "python_class",
            vec![
                attr("cpu", "number"),
                attr("memory", "number"),
                attr("mbits", "number"),
                attr("pids", "number"),
            ],
        ),
        block(
            "run_headroom",
            vec![required("cpu", "number"), required("memory", "number")],
        ),
        block(
            "auth",
            vec![attr("config", "string"), attr("helper", "string")],
        ),
        attr("extra_labels", STRINGS),
        block(
            "logging",
            vec![attr("type", "string"), attr("config", MAPS)],
        ),
        block(
            "gc",
            vec![
                attr("image", "bool"),
                attr("image_delay", "string"),
                attr("container", "bool"),
                block(
                    "dangling_containers",
                    vec![
                        attr("enabled", "bool"),
                        attr("dry_run", "bool"),
                        attr("period", "string"),
                        attr("creation_grace", "string"),
                    ],
                ),
            ],
        ),
        block(
            "volumes",
            vec![attr("enabled", "bool"), attr("selinuxlabel", "string")],
        ),
        attr("allow_privileged", "bool"),
        attr("allow_caps", STRINGS),
        attr("allow_runtimes", STRINGS),
        attr("allow_images", STRINGS),
        block(
            "allowed_modes",
            vec![
                attr("pid", STRINGS),
                attr("ipc", STRINGS),
                attr("uts", STRINGS),
                attr("userns", STRINGS),
            ],
        ),
        attr("pids_limit", "number"),
        attr("image_pull_timeout", "string"),
        attr("pull_activity_timeout", "string"),
        attr("disable_log_collection", "bool"),
        attr("private_networks", STRINGS),
        attr("log_path", "string"),
        attr("no_new_privileges", "bool"),
        attr("enforce_mbits", "bool"),
        attr("nvidia_runtime", "string"),
        // Of Nomad's Docker driver; `from_docker` refuses them in words.
        attr("container_exists_attempts", "number"),
        attr("infra_image", "string"),
        attr("infra_image_pull_timeout", "string"),
        attr("oom_score_adj", "number"),
        attr("windows_allow_insecure_container_admin", "bool"),
    ])
}

/// Options of `task { config { ... } }`.
#[must_use]
pub fn task() -> Spec {
    let upstream = || {
        let options = vec![
            attr("base_url", "string"),
            attr("ca_file", "string"),
            attr("headers", MAPS),
            attr("proxy", "string"),
        ];
        block("upstream", options)
    };
    let slot = vec![
        required("provider", "string"),
        attr("image", "string"),
        attr("run_id", "string"),
        attr("prepare_ahead", "bool"),
        attr("end_on_refused_key", "bool"),
        attr("agent", "bool"),
        attr("tool_policy", "bool"),
        attr("agent_max_age", "string"),
        attr("imports", STRINGS),
        upstream(),
        block("egress", vec![attr("allow", STRINGS)]),
    ];
    object(vec![
        block("slot", slot),
        block(
            "broker",
            vec![
                required("provider", "string"),
                required("credential_file", "string"),
                upstream(),
            ],
        ),
        block("egress", vec![attr("allow", STRINGS)]),
        attr("image", "string"),
        attr("command", "string"),
        attr("args", STRINGS),
        attr("entrypoint", "any"),
        attr("work_dir", "string"),
        attr("force_pull", "bool"),
        attr("image_pull_timeout", "string"),
        block(
            "auth",
            vec![
                attr("username", "string"),
                attr("password", "string"),
                attr("email", "string"),
                attr("server_address", "string"),
            ],
        ),
        attr("auth_soft_fail", "bool"),
        attr("load", "string"),
        attr("container_exists_attempts", "number"),
        attr("cpu_hard_limit", "bool"),
        attr("cpuset_cpus", "string"),
        attr("cpu_cfs_period", "number"),
        attr("memory_hard_limit", "number"),
        attr("pids_limit", "number"),
        attr("ulimit", MAPS),
        attr("sysctl", MAPS),
        attr("shm_size", "number"),
        attr("oom_score_adj", "number"),
        attrs("storage_opt"),
        block(
            "bandwidth",
            vec![
                attr("egress_mbits", "number"),
                attr("ingress_mbits", "number"),
                attr("burst", "number"),
            ],
        ),
        attr("cap_add", STRINGS),
        attr("cap_drop", STRINGS),
        attr("privileged", "bool"),
        attr("security_opt", STRINGS),
        attr("readonly_rootfs", "bool"),
        attr("runtime", "string"),
        attr("isolation", "string"),
        attr("group_add", STRINGS),
        attr("pid_mode", "string"),
        attr("ipc_mode", "string"),
        attr("uts_mode", "string"),
        attr("userns_mode", "string"),
        attr("cgroupns", "string"),
        attr("init", "bool"),
        attr("interactive", "bool"),
        attr("tty", "bool"),
        attr("volumes", STRINGS),
        attr("volume_driver", "string"),
        blocks("mount", mount()),
        blocks("mounts", mount()),
        blocks(
            "devices",
            vec![
                required("host_path", "string"),
                attr("container_path", "string"),
                attr("cgroup_permissions", "string"),
            ],
        ),
        attr("network_mode", "string"),
        attr("network_aliases", STRINGS),
        attr("ports", STRINGS),
        attr("port_map", "list(map(number))"),
        attr("ipv4_address", "string"),
        attr("ipv6_address", "string"),
        attr("mac_address", "string"),
        attr("advertise_ipv6_address", "bool"),
        attr("dns_servers", STRINGS),
        attr("dns_search_domains", STRINGS),
        attr("dns_options", STRINGS),
        attr("extra_hosts", STRINGS),
        attr("hostname", "string"),
        attr("labels", MAPS),
        block(
            "logging",
            vec![
                attr("type", "string"),
                attr("driver", "string"),
                attr("config", MAPS),
            ],
        ),
        block("healthchecks", vec![attr("disable", "bool")]),
    ])
}

fn mount() -> Vec<Named> {
    let driver = vec![attr("name", "string"), attr("options", MAPS)];
    let volume = vec![
        attr("no_copy", "bool"),
        attr("labels", MAPS),
        block("driver_config", driver),
    ];
    vec![
        attr("type", "string"),
        attr("source", "string"),
        required("target", "string"),
        attr("readonly", "bool"),
        block("bind_options", vec![attr("propagation", "string")]),
        block(
            "tmpfs_options",
            vec![attr("size", "number"), attr("mode", "number")],
        ),
        block("volume_options", volume),
    ]
}

type Named = (&'static str, Spec);

fn wrap(block: spec::Block) -> Spec {
    Spec { block: Some(block) }
}

fn object(children: Vec<Named>) -> Spec {
    let attributes: BTreeMap<String, Spec> = children
        .into_iter()
        .map(|(name, spec)| (name.to_owned(), spec))
        .collect();
    wrap(spec::Block::Object(Object { attributes }))
}

fn attr(name: &'static str, kind: &str) -> Named {
    attribute(name, kind, false)
}

fn required(name: &'static str, kind: &str) -> Named {
    attribute(name, kind, true)
}

fn attribute(name: &'static str, kind: &str, required: bool) -> Named {
    let attr = Attr {
        name: name.into(),
        r#type: kind.into(),
        required,
    };
    (name, wrap(spec::Block::Attr(attr)))
}

/// A block that may appear once.
fn block(name: &'static str, children: Vec<Named>) -> Named {
    let block = Block {
        name: name.into(),
        required: false,
        nested: Some(Box::new(object(children))),
    };
    (name, wrap(spec::Block::BlockValue(Box::new(block))))
}

/// A block that may appear any number of times.
fn blocks(name: &'static str, children: Vec<Named>) -> Named {
    let list = BlockList {
        name: name.into(),
        min_items: 0,
        max_items: 0,
        nested: Some(Box::new(object(children))),
    };
    (name, wrap(spec::Block::BlockList(Box::new(list))))
}

/// A block of arbitrary keys with string values.
fn attrs(name: &'static str) -> Named {
    let attrs = BlockAttrs {
        name: name.into(),
        r#type: "string".into(),
        required: false,
    };
    (name, wrap(spec::Block::BlockAttrs(attrs)))
}
