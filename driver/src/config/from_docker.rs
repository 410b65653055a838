//! What becomes of each option of Nomad's Docker driver, as of Nomad 1.11.3. The checks of
//! options, `check-job` and the tables of `docs/from-docker-driver.md` are made of these rows.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    Error,
    value::{decode, refused},
};

/// An option that is not the same here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// With its block, such as `auth.email`.
    pub option: &'static str,
    pub fate: Fate,
}

/// What becomes of an option. The text says what to write in its place, or what differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It works, under this name too.
    Alias(&'static str),
    /// It works otherwise.
    Differs(&'static str),
    /// It has no meaning here.
    Refused(&'static str),
}

impl Fate {
    /// What to write in its place, or what differs.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Alias(text) | Self::Differs(text) | Self::Refused(text) => text,
        }
    }
}

/// The options of one schema.
#[derive(Debug)]
pub struct Table {
    /// Names and meanings are the same.
    pub same: &'static [&'static str],
    pub others: &'static [Row],
}

/// Options of `task { config { ... } }`.
pub const TASK: Table = Table {
    same: &[
        "advertise_ipv6_address",
        "args",
        "auth",
        "auth_soft_fail",
        "cap_add",
        "cap_drop",
        "command",
        "cpu_cfs_period",
        "cpu_hard_limit",
        "devices",
        "dns_options",
        "dns_search_domains",
        "dns_servers",
        "entrypoint",
        "extra_hosts",
        "force_pull",
        "group_add",
        "healthchecks",
        "hostname",
        "image",
        "image_pull_timeout",
        "interactive",
        "ipv4_address",
        "ipv6_address",
        "load",
        "memory_hard_limit",
        "mount",
        "network_aliases",
        "oom_score_adj",
        "ports",
        "privileged",
        "readonly_rootfs",
        "runtime",
        "shm_size",
        "storage_opt",
        "sysctl",
        "tty",
        "ulimit",
        "volume_driver",
        "work_dir",
    ],
    others: &[
        row(
            "auth.email",
            Fate::Refused("registries do not use it; remove it"),
        ),
        row(
            "cgroupns",
            Fate::Differs("`host` needs the plugin's `allow_privileged`"),
        ),
        row(
            "container_exists_attempts",
            Fate::Refused(
                "the driver replaces a container that an earlier attempt left; remove it",
            ),
        ),
        row(
            "cpuset_cpus",
            Fate::Refused(
                "Nomad's Docker driver ignores it since Nomad 1.7; set `resources { cores }`",
            ),
        ),
        row(
            "init",
            Fate::Differs(
                "without it `polydev-init` is process 1, and not the command; images with s6 or systemd run without it",
            ),
        ),
        row(
            "ipc_mode",
            Fate::Differs(
                "a mode that shares needs the plugin's `allowed_modes.ipc` or `allow_privileged`",
            ),
        ),
        row(
            "isolation",
            Fate::Refused("it is for Windows, and this driver for Linux; remove it"),
        ),
        row(
            "labels",
            Fate::Differs(
                "names that begin with `dev.polydev.` or `com.hashicorp.nomad.` are refused",
            ),
        ),
        row(
            "logging",
            Fate::Differs(
                "without it no line passes Docker, and `docker logs` shows none; the plugin's `log_path` changes that",
            ),
        ),
        row(
            "mac_address",
            Fate::Differs("a Docker older than 25 refuses it"),
        ),
        row("mounts", Fate::Alias("write `mount` blocks")),
        row(
            "network_mode",
            Fate::Differs(
                "containers have other names: for the network of another task write `task:NAME`; `container:NAME-${NOMAD_ALLOC_ID}` is understood",
            ),
        ),
        row(
            "pid_mode",
            Fate::Differs(
                "a mode that shares needs the plugin's `allowed_modes.pid` or `allow_privileged`",
            ),
        ),
        row(
            "pids_limit",
            Fate::Differs("the plugin's `pids_limit`, 4096, is the default and the most"),
        ),
        row(
            "port_map",
            Fate::Alias("write `ports`, and `to` in the group's `network` block"),
        ),
        row(
            "security_opt",
            Fate::Differs("a plugin with `no_new_privileges` adds it where the job is silent"),
        ),
        row(
            "userns_mode",
            Fate::Differs("`host` needs the plugin's `allowed_modes.userns` or `allow_privileged`"),
        ),
        row(
            "uts_mode",
            Fate::Differs("`host` needs the plugin's `allowed_modes.uts` or `allow_privileged`"),
        ),
        row(
            "volumes",
            Fate::Differs(
                "where a folder of the host is missing, Docker makes it, and an event says so",
            ),
        ),
    ],
};

/// Options of `plugin "docker" { config { ... } }`.
pub const PLUGIN: Table = Table {
    same: &[
        "allow_caps",
        "allow_privileged",
        "allow_runtimes",
        "auth",
        "disable_log_collection",
        "endpoint",
        "extra_labels",
        "gc",
        "image_pull_timeout",
        "logging",
        "nvidia_runtime",
        "pull_activity_timeout",
        "tls",
        "volumes",
    ],
    others: &[
        row(
            "container_exists_attempts",
            Fate::Refused(
                "the driver replaces a container that an earlier attempt left; remove it",
            ),
        ),
        row(
            "infra_image",
            Fate::Refused("the network of a group needs no image of a registry; remove it"),
        ),
        row(
            "infra_image_pull_timeout",
            Fate::Refused("the network of a group needs no image of a registry; remove it"),
        ),
        row(
            "oom_score_adj",
            Fate::Refused("set `oom_score_adj` in the task"),
        ),
        row(
            "pids_limit",
            Fate::Differs("4096 without it, and not unlimited"),
        ),
        row(
            "windows_allow_insecure_container_admin",
            Fate::Refused("it is for Windows, and this driver for Linux; remove it"),
        ),
    ],
};

const fn row(option: &'static str, fate: Fate) -> Row {
    Row { option, fate }
}

impl Table {
    /// The row of an option that is not the same here.
    #[must_use]
    pub fn row(&self, option: &str) -> Option<&'static Row> {
        self.others.iter().find(|row| row.option == option)
    }

    /// Refuses what has no meaning here, if it is set.
    pub(super) fn check(&self, msgpack: &[u8]) -> Result<(), Error> {
        let all: BTreeMap<String, Value> = decode(msgpack)?;
        for row in self.others {
            let Fate::Refused(instead) = row.fate else {
                continue;
            };
            let (first, rest) = row.option.split_once('.').unwrap_or((row.option, ""));
            let given = all.get(first).and_then(|value| match rest {
                "" => Some(value),
                rest => value.get(rest),
            });
            match given {
                None | Some(Value::Null) => {}
                Some(Value::String(text)) if text.is_empty() => {}
                Some(Value::String(text)) => return Err(refused(row.option, text, instead)),
                Some(other) => return Err(refused(row.option, other, instead)),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::{Config, Plugin, pages::names, schema},
        *,
    };

    fn msgpack(value: &Value) -> Vec<u8> {
        rmp_serde::to_vec_named(value).unwrap()
    }

    #[test]
    fn every_option_of_the_docker_driver_is_taken_or_refused_in_words() {
        for (table, names) in [
            (TASK, names(schema::task())),
            (PLUGIN, names(schema::plugin())),
        ] {
            let others = table.others.iter().map(|row| row.option);
            for option in table.same.iter().copied().chain(others) {
                assert!(
                    names.contains(&option.to_owned()),
                    "{option} is in no schema"
                );
            }
            let is_sorted = |list: &[&str]| list.is_sorted();
            assert!(is_sorted(table.same), "{:?}", table.same);
            assert!(table.others.is_sorted_by_key(|row| row.option));
            let both = table
                .others
                .iter()
                .find(|row| table.same.contains(&row.option));
            assert_eq!(both, None);
        }
    }

    #[test]
    fn what_has_no_meaning_here_is_refused_with_what_to_write() {
        let refused = |table: Table| {
            let rows = table.others.iter();
            rows.filter(|row| matches!(row.fate, Fate::Refused(_)))
        };
        let value = |row: &Row| match row.option.split_once('.') {
            Some((block, inner)) => json!({"image": "a:1", block: {inner: "x"}}),
            None => json!({"image": "a:1", row.option: "x"}),
        };
        for row in refused(TASK) {
            let error = Config::parse(&msgpack(&value(row)))
                .unwrap_err()
                .to_string();
            let expected = format!("`{}` is `x`: {}", row.option, row.fate.text());
            assert_eq!(error, expected);
        }
        for row in refused(PLUGIN) {
            let mut value = value(row);
            value.as_object_mut().unwrap().remove("image");
            let error = Plugin::parse(&msgpack(&value)).unwrap_err().to_string();
            assert!(error.ends_with(row.fate.text()), "{error}");
        }
        // Nomad sends options that are not set too.
        let unset = json!({"image": "a:1", "isolation": null, "cpuset_cpus": ""});
        Config::parse(&msgpack(&unset)).unwrap();
    }
}
