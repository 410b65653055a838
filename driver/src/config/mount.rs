//! Which parts of the host a plain task sees: volumes, mounts and devices.

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;

use super::{
    Error, Task,
    value::{self, Maps, Number, merged, refused, text},
};

/// The short form, `source:target[:options]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Host path; relative paths start at the task's folder.
    pub source: String,
    pub target: String,
    /// Comma-separated list such as `ro` or `rw,Z`; may be empty.
    pub options: String,
}

/// The long form, a `mount` block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub target: String,
    pub readonly: bool,
    pub kind: MountKind,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountKind {
    /// Host path; relative paths start at the task's folder.
    Bind {
        source: String,
        propagation: Option<String>,
    },
    /// A Docker volume; anonymous if it has no name.
    Volume {
        name: Option<String>,
        no_copy: bool,
        labels: BTreeMap<String, String>,
        driver: Option<String>,
        driver_options: BTreeMap<String, String>,
    },
    /// Memory.
    Tmpfs {
        size: Option<i64>,
        mode: Option<i64>,
    },
}

/// A device of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    pub host_path: String,
    pub container_path: String,
    /// Any of `r`, `w` and `m`.
    pub permissions: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawMount {
    r#type: Option<String>,
    source: Option<String>,
    target: Option<String>,
    readonly: Option<bool>,
    bind_options: Option<RawBindOptions>,
    tmpfs_options: Option<RawTmpfsOptions>,
    volume_options: Option<RawVolumeOptions>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBindOptions {
    propagation: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTmpfsOptions {
    size: Option<Number>,
    mode: Option<Number>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVolumeOptions {
    no_copy: Option<bool>,
    labels: Maps,
    driver_config: Option<RawDriverConfig>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDriverConfig {
    name: Option<String>,
    options: Maps,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawDevice {
    host_path: Option<String>,
    container_path: Option<String>,
    cgroup_permissions: Option<String>,
}

impl Volume {
    pub(super) fn parse(spec: &str) -> Result<Self, Error> {
        let wrong = || {
            refused(
                "volumes",
                spec,
                "must be `source:target` or `source:target:options`",
            )
        };
        let parts: Vec<&str> = spec.split(':').collect();
        let (source, target, options) = match parts[..] {
            [source, target] => (source, target, ""),
            [source, target, options] if !options.is_empty() => (source, target, options),
            _ => return Err(wrong()),
        };
        if source.is_empty() {
            return Err(wrong());
        }
        Ok(Self {
            source: source.into(),
            target: target_path("volumes", target)?,
            options: options.into(),
        })
    }
}

impl RawMount {
    pub(super) fn check(self) -> Result<Mount, Error> {
        let kind = text(self.r#type).unwrap_or_else(|| "volume".into());
        let kind = value::one_of("mount.type", &kind, &["bind", "tmpfs", "volume"])?;
        for (block, given) in [
            ("bind", self.bind_options.is_some()),
            ("tmpfs", self.tmpfs_options.is_some()),
            ("volume", self.volume_options.is_some()),
        ] {
            if given && block != kind {
                let allowed = format!("`{block}_options` does not apply to this type");
                return Err(refused("mount.type", kind, allowed));
            }
        }
        let source = text(self.source);
        let kind = match kind {
            "bind" => MountKind::Bind {
                source: source
                    .ok_or_else(|| refused("mount.source", "", "must be a path of the host"))?,
                propagation: text(self.bind_options.and_then(|options| options.propagation))
                    .map(|given| propagation("mount.bind_options.propagation", &given))
                    .transpose()?,
            },
            "tmpfs" => {
                if let Some(source) = source {
                    return Err(refused("mount.source", source, "a tmpfs has no source"));
                }
                let options = self.tmpfs_options;
                let (size, mode) =
                    options.map_or((None, None), |options| (options.size, options.mode));
                MountKind::Tmpfs {
                    size: value::whole("mount.tmpfs_options.size", size, 0, 1 << 40)?
                        .filter(|size| *size > 0),
                    mode: value::whole("mount.tmpfs_options.mode", mode, 0, 0o7777)?,
                }
            }
            _ => {
                let options = self.volume_options;
                let (no_copy, labels, driver) = options.map_or((None, None, None), |options| {
                    (options.no_copy, options.labels, options.driver_config)
                });
                let (driver, driver_options) =
                    driver.map_or((None, None), |driver| (text(driver.name), driver.options));
                MountKind::Volume {
                    name: source,
                    no_copy: no_copy.unwrap_or_default(),
                    labels: merged(labels),
                    driver,
                    driver_options: merged(driver_options),
                }
            }
        };
        Ok(Mount {
            target: target_path("mount.target", self.target.as_deref().unwrap_or_default())?,
            readonly: self.readonly.unwrap_or_default(),
            kind,
        })
    }
}

impl RawDevice {
    pub(super) fn check(self) -> Result<Device, Error> {
        let host_path = self.host_path.unwrap_or_default();
        if !Path::new(&host_path).is_absolute() {
            return Err(refused(
                "devices.host_path",
                host_path,
                "must be an absolute path",
            ));
        }
        let permissions = text(self.cgroup_permissions).unwrap_or_else(|| "rwm".into());
        if !permissions.chars().all(|letter| "rwm".contains(letter)) {
            let allowed = "may contain only the letters r, w and m";
            return Err(refused("devices.cgroup_permissions", permissions, allowed));
        }
        Ok(Device {
            container_path: text(self.container_path).unwrap_or_else(|| host_path.clone()),
            host_path,
            permissions,
        })
    }
}

/// Docker's names for mount propagation.
pub(super) fn propagation(field: &str, given: &str) -> Result<String, Error> {
    const WORDS: [&str; 6] = [
        "private", "rprivate", "rshared", "rslave", "shared", "slave",
    ];
    value::one_of(field, given, &WORDS).map(str::to_owned)
}

/// A target may not cover another mount, or a folder of Nomad or of the driver.
pub(super) fn check_targets(task: &Task) -> Result<(), Error> {
    const OURS: &str = "/.polydev";
    const NOMADS: [&str; 3] = ["/alloc", "/local", "/secrets"];
    let volumes = task
        .volumes
        .iter()
        .map(|volume| ("volumes", &volume.target));
    let mounts = task
        .mounts
        .iter()
        .map(|mount| ("mount.target", &mount.target));
    let mut seen = std::collections::BTreeSet::new();
    for (field, target) in volumes.chain(mounts) {
        if target.split('/').any(|part| part == "..") {
            return Err(refused(field, target, "must not contain `..`"));
        }
        if Path::new(target).starts_with(OURS) {
            return Err(refused(field, target, format!("must be outside `{OURS}`")));
        }
        if NOMADS
            .iter()
            .any(|folder| Path::new(folder) == Path::new(target))
        {
            let allowed = "must not be `/alloc`, `/local` or `/secrets`, which Nomad mounts";
            return Err(refused(field, target, allowed));
        }
        if !seen.insert(Path::new(target)) {
            return Err(refused(field, target, "each target may be used once"));
        }
    }
    Ok(())
}

fn target_path(field: &str, given: &str) -> Result<String, Error> {
    if Path::new(given).is_absolute() && given != "/" {
        Ok(given.to_owned())
    } else {
        Err(refused(
            field,
            given,
            "must be an absolute path inside the container, and not `/`",
        ))
    }
}
