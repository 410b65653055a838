//! The plugin's options.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::Ipv4Net;
use nix::unistd::Gid;
use polydev_proto::provider::Provider;
use serde::{Deserialize, de::IgnoredAny};

use super::{
    Error,
    boost::Boost,
    class::RawClass,
    egress::private_networks,
    gc::{Gc, RawGc},
    shims::{self, RawShims, Shims},
    task::Logging,
    telemetry::{RawTelemetry, Telemetry},
    value::{self, Maps, Number, absolute, duration, merged, ranged, refused, text},
};
use crate::{headroom::Amount, limits::Limits};

/// Docker's default capabilities, except NET_RAW, which allows forging packets on a bridge
/// (CVE-2021-32575).
pub(super) const DEFAULT_CAPS: [&str; 13] = [
    "audit_write",
    "chown",
    "dac_override",
    "fowner",
    "fsetid",
    "kill",
    "mknod",
    "net_bind_service",
    "setfcap",
    "setgid",
    "setpcap",
    "setuid",
    "sys_chroot",
];

/// Of no user on Debian, Fedora and their relatives: above what `adduser` and `useradd` give,
/// and above systemd's dynamic users (61184 to 65519).
const BROKER_UID: u32 = 66_319;

/// Facts about a task that labels may show.
pub const EXTRA_LABELS: [&str; 8] = [
    "job_id",
    "job_name",
    "namespace",
    "node_id",
    "node_name",
    "parent_job_id",
    "task_group_name",
    "task_name",
];

/// The plugin's options, complete and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Plugin {
    pub endpoint: Endpoint,
    /// The driver's own folder, for sockets, its lock, its journal and its identity.
    pub state_dir: PathBuf,
    /// The `polydev-init` program.
    pub init_path: PathBuf,
    /// The `polydev-broker` program.
    pub broker_path: PathBuf,
    /// The user that it runs as.
    pub broker_uid: u32,
    /// Limits of a run.
    pub run: Limits,
    /// Limits of a script.
    pub script: Limits,
    pub start_boost: Option<Boost>,
    /// For all runs together, on top of what Nomad reserves for their slots.
    pub run_headroom: Option<Amount>,
    pub auth: Auth,
    /// Globs over [`EXTRA_LABELS`].
    pub extra_labels: Vec<String>,
    /// For tasks whose output goes through a Docker log driver.
    pub logging: Logging,
    pub gc: Gc,
    pub volumes: bool,
    /// Appended to bind mounts, `z` or `Z`.
    pub selinux_label: Option<String>,
    pub allow: Allow,
    /// Largest process limit of a plain task, and its default.
    pub pids_limit: u32,
    pub image_pull_timeout: Duration,
    /// A pull without progress is cancelled after this time.
    pub pull_activity_timeout: Duration,
    pub disable_log_collection: bool,
    /// Networks that are not public, and that slots with a network interface may reach.
    pub private_networks: Vec<Ipv4Net>,
    pub log_path: LogPath,
    /// Whether plain tasks get it whose `security_opt` is silent.
    pub no_new_privileges: bool,
    /// Whether `mbits` of a task's `network` block is a limit, and not bookkeeping alone.
    pub enforce_mbits: bool,
    /// The runtime of tasks with a device of NVIDIA's.
    pub nvidia_runtime: String,
    pub shims: Option<Shims>,
    /// Whose members reach the node's socket. `None` for root alone.
    pub socket_group: Option<Gid>,
    pub telemetry: Option<Telemetry>,
    /// Public keys of those who sign execution tokens. With it, claims need one.
    pub execution_keys: Option<PathBuf>,
}

/// Where Docker is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// `unix://` and a path, or `tcp://host:port` of this machine.
    pub address: String,
    pub tls: Option<Tls>,
}

/// Files for a Docker daemon that requires client certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    pub cert: PathBuf,
    pub key: PathBuf,
    pub ca: PathBuf,
}

/// Where registry credentials come from if a task has none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Auth {
    /// A file such as `~/.docker/config.json`.
    pub config: Option<PathBuf>,
    /// Suffix of a `docker-credential-` program's name.
    pub helper: Option<String>,
}

/// How the output of plain tasks leaves their containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogPath {
    /// From init to Nomad.
    #[default]
    Direct,
    /// To dockerd, and from there to Nomad.
    Docker,
    /// From init to both.
    Both,
}

impl LogPath {
    fn parse(given: String) -> Result<Self, Error> {
        let word = value::one_of("log_path", &given, &["direct", "docker", "both"])?;
        Ok(match word {
            "docker" => Self::Docker,
            "both" => Self::Both,
            _ => Self::Direct,
        })
    }
}

/// What the operator lets jobs do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allow {
    pub privileged: bool,
    /// In lower case, without `cap_`; `all` stands for every capability.
    pub caps: Vec<String>,
    pub runtimes: Vec<String>,
    /// Globs over image references; empty allows every image.
    pub images: Vec<String>,
    pub modes: Modes,
}

/// Globs over the modes that share a namespace with the host or another container.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Modes {
    pub pid: Vec<String>,
    pub ipc: Vec<String>,
    pub uts: Vec<String>,
    pub userns: Vec<String>,
}

impl Plugin {
    /// Limits of a run for this provider.
    #[must_use]
    pub fn class(&self, provider: Provider) -> Limits {
        match provider {
            Provider::Cli(_) => self.run,
            Provider::Python => self.script,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Raw {
    endpoint: Option<String>,
    tls: Option<RawTls>,
    state_dir: Option<String>,
    init_path: Option<String>,
    broker_path: Option<String>,
    broker_uid: Option<Number>,
    run_class: Option<RawClass>,
    python_class: Option<RawClass>,
    run_headroom: Option<RawHeadroom>,
    auth: Option<RawAuth>,
    extra_labels: Option<Vec<String>>,
    logging: Option<RawLogging>,
    gc: Option<RawGc>,
    volumes: Option<RawVolumes>,
    allow_privileged: Option<bool>,
    allow_caps: Option<Vec<String>>,
    allow_runtimes: Option<Vec<String>>,
    allow_images: Option<Vec<String>>,
    allowed_modes: Option<RawModes>,
    pids_limit: Option<Number>,
    image_pull_timeout: Option<String>,
    pull_activity_timeout: Option<String>,
    disable_log_collection: Option<bool>,
    private_networks: Option<Vec<String>>,
    log_path: Option<String>,
    no_new_privileges: Option<bool>,
    enforce_mbits: Option<bool>,
    nvidia_runtime: Option<String>,
    shims: Option<RawShims>,
    socket_group: Option<String>,
    telemetry: Option<RawTelemetry>,
    execution_tokens: Option<RawExecution>,

    // Refused by `from_docker` before.
    #[serde(rename = "container_exists_attempts")]
    _container_exists_attempts: Option<IgnoredAny>,
    #[serde(rename = "infra_image")]
    _infra_image: Option<IgnoredAny>,
    #[serde(rename = "infra_image_pull_timeout")]
    _infra_image_pull_timeout: Option<IgnoredAny>,
    #[serde(rename = "oom_score_adj")]
    _oom_score_adj: Option<IgnoredAny>,
    #[serde(rename = "windows_allow_insecure_container_admin")]
    _windows_allow_insecure_container_admin: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    cert: Option<String>,
    key: Option<String>,
    ca: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawExecution {
    keys: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHeadroom {
    cpu: Option<Number>,
    memory: Option<Number>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAuth {
    config: Option<String>,
    helper: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLogging {
    r#type: Option<String>,
    config: Maps,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVolumes {
    enabled: Option<bool>,
    selinuxlabel: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawModes {
    pid: Option<Vec<String>>,
    ipc: Option<Vec<String>>,
    uts: Option<Vec<String>>,
    userns: Option<Vec<String>>,
}

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

impl Raw {
    pub(super) fn check(self) -> Result<Plugin, Error> {
        let (volumes, selinux_label) = self.volumes.map_or((None, None), |volumes| {
            (volumes.enabled, text(volumes.selinuxlabel))
        });
        if let Some(label) = &selinux_label {
            value::one_of("volumes.selinuxlabel", label, &["z", "Z"])?;
        }
        let auth = self.auth.map_or_else(
            || Ok(Auth::default()),
            |auth| {
                let config = text(auth.config).map(|path| absolute("auth.config", &path));
                Ok(Auth {
                    config: config.transpose()?,
                    helper: text(auth.helper),
                })
            },
        )?;
        if let Some(helper) = auth.helper.as_ref().filter(|name| name.contains('/')) {
            let allowed = "must be the part of a program's name after `docker-credential-`";
            return Err(refused("auth.helper", helper, allowed));
        }
        let modes = self.allowed_modes.unwrap_or_default();
        let caps = self
            .allow_caps
            .map(|caps| caps.iter().map(|cap| cap_name(cap)).collect());
        let runtimes = self.allow_runtimes;
        let init_path = match text(self.init_path) {
            Some(path) => absolute("init_path", &path)?,
            None => beside_this_program("polydev-init"),
        };
        let class = self.run_class.unwrap_or_default();
        let (run, start_boost) = class.run(self.run_headroom.is_some())?;
        let script = self.python_class.unwrap_or_default();
        Ok(Plugin {
            endpoint: endpoint(text(self.endpoint), self.tls)?,
            state_dir: state_dir(text(self.state_dir))?,
            broker_path: match text(self.broker_path) {
                Some(path) => absolute("broker_path", &path)?,
                None => init_path.with_file_name("polydev-broker"),
            },
            init_path,
            broker_uid: ranged("broker_uid", self.broker_uid, BROKER_UID, 1, u32::MAX - 1)?,
            run,
            script: script.check("python_class", Limits::SCRIPT)?,
            start_boost,
            run_headroom: self.run_headroom.map(RawHeadroom::check).transpose()?,
            auth,
            extra_labels: self.extra_labels.unwrap_or_default(),
            logging: self.logging.map_or_else(
                || Logging {
                    driver: "json-file".into(),
                    config: [("max-file", "2"), ("max-size", "2m")]
                        .map(|(key, value)| (key.into(), value.into()))
                        .into(),
                },
                |logging| Logging {
                    driver: text(logging.r#type).unwrap_or_else(|| "json-file".into()),
                    config: merged(logging.config),
                },
            ),
            gc: self.gc.unwrap_or_default().check()?,
            volumes: volumes.unwrap_or_default(),
            selinux_label,
            allow: Allow {
                privileged: self.allow_privileged.unwrap_or_default(),
                caps: caps.unwrap_or_else(|| DEFAULT_CAPS.map(str::to_owned).into()),
                runtimes: runtimes.unwrap_or_else(|| vec!["runc".into(), "nvidia".into()]),
                images: self.allow_images.unwrap_or_default(),
                modes: Modes {
                    pid: modes.pid.unwrap_or_default(),
                    ipc: modes.ipc.unwrap_or_default(),
                    uts: modes.uts.unwrap_or_default(),
                    userns: modes.userns.unwrap_or_default(),
                },
            },
            pids_limit: ranged("pids_limit", self.pids_limit, 4096, 1, 4_194_304)?,
            image_pull_timeout: duration(
                "image_pull_timeout",
                text(self.image_pull_timeout),
                5 * MINUTE,
                SECOND,
            )?,
            pull_activity_timeout: duration(
                "pull_activity_timeout",
                text(self.pull_activity_timeout),
                2 * MINUTE,
                MINUTE,
            )?,
            disable_log_collection: self.disable_log_collection.unwrap_or_default(),
            private_networks: private_networks(self.private_networks)?,
            log_path: text(self.log_path)
                .map(LogPath::parse)
                .transpose()?
                .unwrap_or_default(),
            no_new_privileges: self.no_new_privileges.unwrap_or_default(),
            enforce_mbits: self.enforce_mbits.unwrap_or_default(),
            nvidia_runtime: text(self.nvidia_runtime).unwrap_or_else(|| "nvidia".into()),
            shims: self.shims.map(RawShims::check).transpose()?,
            socket_group: text(self.socket_group).map(shims::group).transpose()?,
            telemetry: self.telemetry.map(RawTelemetry::check).transpose()?,
            execution_keys: self.execution_tokens.map(RawExecution::check).transpose()?,
        })
    }
}

impl RawExecution {
    fn check(self) -> Result<PathBuf, Error> {
        let keys = text(self.keys).unwrap_or_default();
        value::absolute("execution_tokens.keys", &keys)
    }
}

impl RawHeadroom {
    fn check(self) -> Result<Amount, Error> {
        let required = |field, given: Option<Number>, most| match given {
            Some(_) => ranged(field, given, 0, 0, most),
            None => Err(refused(field, "missing", "must be a number")),
        };
        Ok(Amount {
            cpu_mhz: required("run_headroom.cpu", self.cpu, 4_000_000)?,
            memory_mb: required("run_headroom.memory", self.memory, 67_108_864)?,
        })
    }
}

/// `CAP_NET_ADMIN` and `net_admin` are the same.
pub(super) fn cap_name(given: &str) -> String {
    let lower = given.to_lowercase();
    lower
        .strip_prefix("cap_")
        .map(str::to_owned)
        .unwrap_or(lower)
}

fn endpoint(address: Option<String>, tls: Option<RawTls>) -> Result<Endpoint, Error> {
    let address = address.unwrap_or_else(|| "unix:///var/run/docker.sock".into());
    let unix = address
        .strip_prefix("unix://")
        .is_some_and(|path| path.starts_with('/'));
    let tcp = address
        .strip_prefix("tcp://")
        .is_some_and(|host| host.contains(':'));
    if !unix && !tcp {
        let allowed = "must be `unix://` and an absolute path, or `tcp://host:port`";
        return Err(refused("endpoint", address, allowed));
    }
    let file =
        |field: &str, given: Option<String>| absolute(field, given.as_deref().unwrap_or_default());
    let tls = tls.map(|tls| {
        Ok(Tls {
            cert: file("tls.cert", tls.cert)?,
            key: file("tls.key", tls.key)?,
            ca: file("tls.ca", tls.ca)?,
        })
    });
    if unix && tls.is_some() {
        return Err(refused(
            "endpoint",
            address,
            "must be `tcp://host:port` if there is a `tls` block",
        ));
    }
    Ok(Endpoint {
        address,
        tls: tls.transpose()?,
    })
}

fn state_dir(given: Option<String>) -> Result<PathBuf, Error> {
    let path = absolute("state_dir", given.as_deref().unwrap_or("/var/lib/polydev"))?;
    // The path of a Unix socket has at most 107 bytes; the driver's are up to 60 longer
    // than the folder's.
    if path.as_os_str().len() > 48 {
        let allowed = "must have at most 48 bytes, because of the sockets below it";
        return Err(refused("state_dir", path.display(), allowed));
    }
    Ok(path)
}

fn beside_this_program(name: &str) -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    let folder = program.parent().unwrap_or(Path::new("/"));
    folder.join(name)
}
