//! A plain task's options: those of Nomad's Docker driver, with the same names and
//! meanings, checked one by one. [`super::allow`] checks what the plugin must allow.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use serde::{Deserialize, de::IgnoredAny};

use super::{
    Broker, Egress, Error,
    auth::{Auth, RawAuth},
    broker, egress,
    mount::{self, Device, Mount, Volume},
    network::{address, addresses, extra_hosts, mac_address, port_map},
    value::{self, Maps, Number, OneOrMany, merged, refused, text},
};

/// CFS periods that the kernel accepts, in microseconds.
const CFS_PERIOD: (u32, u32) = (1_000, 1_000_000);

/// A plain task's options, complete and checked.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Task {
    pub image: String,
    pub command: Option<String>,
    pub args: Vec<String>,
    /// Replaces the image's entrypoint; the image's command is then ignored.
    pub entrypoint: Option<Vec<String>>,
    pub work_dir: Option<String>,
    pub force_pull: bool,
    /// `None`: the plugin's value.
    pub image_pull_timeout: Option<Duration>,
    pub auth: Option<Auth>,
    pub auth_soft_fail: bool,
    /// Path of an image archive, relative to the task's `local` folder.
    pub load: Option<String>,

    pub cpu_hard_limit: bool,
    pub cpu_cfs_period: Duration,
    /// MiB; 0 means no limit.
    pub memory_hard_limit: u32,
    /// `None`: the plugin's value.
    pub pids_limit: Option<u32>,
    pub ulimits: Vec<Ulimit>,
    pub sysctl: BTreeMap<String, String>,
    /// Bytes.
    pub shm_size: Option<i64>,
    pub oom_score_adj: i64,
    pub storage_opt: BTreeMap<String, String>,
    pub bandwidth: Bandwidth,

    pub cap_add: Vec<String>,
    pub cap_drop: Vec<String>,
    pub privileged: bool,
    pub security_opt: Vec<String>,
    pub readonly_rootfs: bool,
    pub runtime: Option<String>,
    pub group_add: Vec<String>,
    pub pid_mode: Option<String>,
    pub ipc_mode: Option<String>,
    pub uts_mode: Option<String>,
    pub userns_mode: Option<String>,
    pub cgroupns: Option<String>,

    /// Whether polydev-init is process 1. `None`: unless the image's program must be.
    pub init: Option<bool>,
    pub interactive: bool,
    pub tty: bool,

    pub volumes: Vec<Volume>,
    pub mounts: Vec<Mount>,
    /// Of the Docker volumes in `volumes`.
    pub volume_driver: Option<String>,
    pub devices: Vec<Device>,

    /// A key for a model that stays outside.
    pub broker: Option<Broker>,
    /// What it may reach through the broker, in place of a network. `None` for a network.
    pub egress: Option<Vec<String>>,
    pub network_mode: Option<String>,
    pub network_aliases: Vec<String>,
    pub ports: Vec<String>,
    /// Of older jobs: the port inside, by the label of the port.
    pub port_map: BTreeMap<String, u16>,
    /// In a network of the operator's.
    pub ipv4_address: Option<Ipv4Addr>,
    pub ipv6_address: Option<Ipv6Addr>,
    pub mac_address: Option<String>,
    /// Whether services are told the container's IPv6 address.
    pub advertise_ipv6_address: bool,
    pub dns_servers: Vec<String>,
    pub dns_search_domains: Vec<String>,
    pub dns_options: Vec<String>,
    pub extra_hosts: Vec<String>,
    pub hostname: Option<String>,

    pub labels: BTreeMap<String, String>,
    /// If set, output goes through this Docker log driver instead of directly to Nomad.
    pub logging: Option<Logging>,
    pub healthchecks_disabled: bool,
}

/// A kernel resource limit, as in a shell's `ulimit`; -1 is unlimited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ulimit {
    pub name: String,
    pub soft: i64,
    pub hard: i64,
}

/// A Docker log driver and its options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logging {
    pub driver: String,
    pub config: BTreeMap<String, String>,
}

/// Megabits (10^6 bits) per second, seen from the container; `None` is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bandwidth {
    pub egress_mbits: Option<u32>,
    pub ingress_mbits: Option<u32>,
    /// KiB that pass at full speed after a pause; `None` uses the default.
    pub burst_kib: Option<u32>,
}

impl Bandwidth {
    /// Whether the job has the block.
    #[must_use]
    pub fn is_set(&self) -> bool {
        *self != Self::default()
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Raw {
    pub(super) slot: Option<super::slot::Raw>,
    pub(super) image: Option<String>,
    command: Option<String>,
    args: Option<Vec<String>>,
    entrypoint: Option<OneOrMany>,
    work_dir: Option<String>,
    force_pull: Option<bool>,
    image_pull_timeout: Option<String>,
    auth: Option<RawAuth>,
    auth_soft_fail: Option<bool>,
    load: Option<String>,
    cpu_hard_limit: Option<bool>,
    cpu_cfs_period: Option<Number>,
    memory_hard_limit: Option<Number>,
    pids_limit: Option<Number>,
    ulimit: Maps,
    sysctl: Maps,
    shm_size: Option<Number>,
    oom_score_adj: Option<Number>,
    storage_opt: Option<BTreeMap<String, String>>,
    bandwidth: Option<RawBandwidth>,
    cap_add: Option<Vec<String>>,
    cap_drop: Option<Vec<String>>,
    privileged: Option<bool>,
    security_opt: Option<Vec<String>>,
    readonly_rootfs: Option<bool>,
    runtime: Option<String>,
    group_add: Option<Vec<String>>,
    pid_mode: Option<String>,
    ipc_mode: Option<String>,
    uts_mode: Option<String>,
    userns_mode: Option<String>,
    cgroupns: Option<String>,
    init: Option<bool>,
    interactive: Option<bool>,
    tty: Option<bool>,
    volumes: Option<Vec<String>>,
    mount: Option<Vec<mount::RawMount>>,
    mounts: Option<Vec<mount::RawMount>>,
    volume_driver: Option<String>,
    devices: Option<Vec<mount::RawDevice>>,
    broker: Option<broker::Raw>,
    egress: Option<egress::Raw>,
    network_mode: Option<String>,
    network_aliases: Option<Vec<String>>,
    ports: Option<Vec<String>>,
    port_map: Option<Vec<BTreeMap<String, Number>>>,
    ipv4_address: Option<String>,
    ipv6_address: Option<String>,
    mac_address: Option<String>,
    advertise_ipv6_address: Option<bool>,
    dns_servers: Option<Vec<String>>,
    dns_search_domains: Option<Vec<String>>,
    dns_options: Option<Vec<String>>,
    extra_hosts: Option<Vec<String>>,
    hostname: Option<String>,
    labels: Maps,
    logging: Option<RawLogging>,
    healthchecks: Option<RawHealthchecks>,

    // Refused by `from_docker` before.
    #[serde(rename = "container_exists_attempts")]
    _container_exists_attempts: Option<IgnoredAny>,
    #[serde(rename = "cpuset_cpus")]
    _cpuset_cpus: Option<IgnoredAny>,
    #[serde(rename = "isolation")]
    _isolation: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBandwidth {
    egress_mbits: Option<Number>,
    ingress_mbits: Option<Number>,
    burst: Option<Number>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLogging {
    r#type: Option<String>,
    driver: Option<String>,
    config: Maps,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHealthchecks {
    disable: Option<bool>,
}

impl Task {
    /// Whether its container has a way to the broker.
    #[must_use]
    pub fn is_brokered(&self) -> bool {
        self.brokered_by().is_some()
    }

    /// The option for which it has one.
    #[must_use]
    pub fn brokered_by(&self) -> Option<&'static str> {
        let broker = self.broker.as_ref().map(|_| "broker");
        self.egress.as_ref().map(|_| "egress").or(broker)
    }
}

impl Raw {
    pub(super) fn check(self) -> Result<Task, Error> {
        let task = Task {
            image: image(self.image)?,
            command: self.command.map(command).transpose()?,
            args: self.args.unwrap_or_default(),
            entrypoint: self.entrypoint.map(OneOrMany::into_vec),
            work_dir: text(self.work_dir),
            force_pull: self.force_pull.unwrap_or_default(),
            image_pull_timeout: text(self.image_pull_timeout)
                .map(pull_timeout)
                .transpose()?,
            auth: self.auth.map(Auth::from),
            auth_soft_fail: self.auth_soft_fail.unwrap_or_default(),
            load: text(self.load),
            cpu_hard_limit: self.cpu_hard_limit.unwrap_or_default(),
            cpu_cfs_period: cfs_period(self.cpu_cfs_period)?,
            memory_hard_limit: value::ranged(
                "memory_hard_limit",
                self.memory_hard_limit,
                0,
                0,
                4_194_304,
            )?,
            pids_limit: value::whole("pids_limit", self.pids_limit, -1, 4_194_304)?
                .and_then(|limit| u32::try_from(limit).ok())
                .filter(|limit| *limit > 0),
            ulimits: merged(self.ulimit)
                .into_iter()
                .map(ulimit)
                .collect::<Result<_, _>>()?,
            sysctl: merged(self.sysctl),
            shm_size: value::whole("shm_size", self.shm_size, 0, 1 << 40)?.filter(|size| *size > 0),
            oom_score_adj: value::whole("oom_score_adj", self.oom_score_adj, -1000, 1000)?
                .unwrap_or(0),
            storage_opt: self.storage_opt.unwrap_or_default(),
            bandwidth: self
                .bandwidth
                .map(RawBandwidth::check)
                .transpose()?
                .unwrap_or_default(),
            cap_add: self.cap_add.unwrap_or_default(),
            cap_drop: self.cap_drop.unwrap_or_default(),
            privileged: self.privileged.unwrap_or_default(),
            security_opt: self.security_opt.unwrap_or_default(),
            readonly_rootfs: self.readonly_rootfs.unwrap_or_default(),
            runtime: text(self.runtime),
            group_add: self.group_add.unwrap_or_default(),
            pid_mode: text(self.pid_mode),
            ipc_mode: text(self.ipc_mode),
            uts_mode: text(self.uts_mode),
            userns_mode: text(self.userns_mode),
            cgroupns: text(self.cgroupns).map(cgroupns).transpose()?,
            init: self.init,
            interactive: self.interactive.unwrap_or_default(),
            tty: self.tty.unwrap_or_default(),
            volumes: each(self.volumes, |spec| Volume::parse(&spec))?,
            mounts: {
                // Two names of one option.
                let both = self.mount.into_iter().chain(self.mounts).flatten();
                each(Some(both.collect()), mount::RawMount::check)?
            },
            volume_driver: text(self.volume_driver),
            devices: each(self.devices, mount::RawDevice::check)?,
            broker: self.broker.map(broker::Raw::check).transpose()?,
            egress: match self
                .egress
                .map(|egress| egress.check("egress"))
                .transpose()?
            {
                Some(Egress::Listed(allow)) => Some(allow),
                Some(Egress::Internet) | None => None,
            },
            network_mode: text(self.network_mode),
            network_aliases: self.network_aliases.unwrap_or_default(),
            ports: self.ports.unwrap_or_default(),
            port_map: port_map(self.port_map)?,
            ipv4_address: address("ipv4_address", self.ipv4_address)?,
            ipv6_address: address("ipv6_address", self.ipv6_address)?,
            mac_address: mac_address(self.mac_address)?,
            advertise_ipv6_address: self.advertise_ipv6_address.unwrap_or_default(),
            dns_servers: addresses("dns_servers", self.dns_servers)?,
            dns_search_domains: self.dns_search_domains.unwrap_or_default(),
            dns_options: self.dns_options.unwrap_or_default(),
            extra_hosts: extra_hosts(self.extra_hosts)?,
            hostname: text(self.hostname),
            labels: labels(merged(self.labels))?,
            logging: self.logging.map(RawLogging::check),
            healthchecks_disabled: self
                .healthchecks
                .and_then(|checks| checks.disable)
                .unwrap_or_default(),
        };
        mount::check_targets(&task)?;
        check_ports(&task)?;
        check_broker(&task)?;
        Ok(task)
    }
}

/// `port_map` is of jobs that are older than `ports`.
fn check_ports(task: &Task) -> Result<(), Error> {
    if task.ports.is_empty() || task.port_map.is_empty() {
        return Ok(());
    }
    let labels: Vec<&str> = task.port_map.keys().map(String::as_str).collect();
    let allowed = "must be absent beside `ports`; set `to` in the group's `network` block";
    Err(refused("port_map", labels.join(", "), allowed))
}

/// A task's own loopback is its way to the broker, and init listens there.
fn check_broker(task: &Task) -> Result<(), Error> {
    let Some(field) = task.brokered_by() else {
        return Ok(());
    };
    if task.init == Some(false) {
        let allowed = format!("must be `true` beside `{field}`");
        return Err(refused("init", "false", allowed));
    }
    if task.privileged {
        let allowed = format!("must be `false` beside `{field}`: it could undo that");
        return Err(refused("privileged", "true", allowed));
    }
    let mode = task.network_mode.as_deref();
    let mut ports = task.ports.iter().chain(task.port_map.keys());
    if let Some(port) = ports.next().filter(|_| task.egress.is_some()) {
        let allowed = "must be empty beside `egress`: nothing can connect to the task";
        return Err(refused("ports", port, allowed));
    }
    match mode {
        Some(mode) if task.egress.is_some() && mode != "none" => {
            let allowed = "must be `none`, or absent, beside `egress`";
            Err(refused("network_mode", mode, allowed))
        }
        Some(mode)
            if mode == "host" || mode.starts_with("container:") || mode.starts_with("task:") =>
        {
            let allowed = "must be a network of the task's own beside `broker`";
            Err(refused("network_mode", mode, allowed))
        }
        _ => Ok(()),
    }
}

fn each<T, U>(
    given: Option<Vec<T>>,
    check: impl Fn(T) -> Result<U, Error>,
) -> Result<Vec<U>, Error> {
    given.into_iter().flatten().map(check).collect()
}

fn image(given: Option<String>) -> Result<String, Error> {
    let given = given.unwrap_or_default();
    // Nomad's Docker driver also accepts a web address.
    let image = given.strip_prefix("https://").unwrap_or(&given).to_owned();
    let is_whole = !image.is_empty() && !image.ends_with([':', '@', '/']);
    if !is_whole || image.contains(char::is_whitespace) {
        return Err(Error::NoImage { given: image });
    }
    Ok(image)
}

fn command(given: String) -> Result<String, Error> {
    if given.is_empty() || given.trim() != given {
        let allowed = "must be a program's name without white space around it";
        return Err(refused("command", &given, allowed));
    }
    Ok(given)
}

fn pull_timeout(given: String) -> Result<Duration, Error> {
    let least = Duration::from_secs(1);
    value::duration("image_pull_timeout", Some(given), least, least)
}

fn cfs_period(given: Option<Number>) -> Result<Duration, Error> {
    let (least, most) = CFS_PERIOD;
    let period = value::ranged("cpu_cfs_period", given, 100_000, least, most)?;
    Ok(Duration::from_micros(period.into()))
}

fn cgroupns(given: String) -> Result<String, Error> {
    let allowed = ["host", "private"];
    value::one_of("cgroupns", &given, &allowed).map(str::to_owned)
}

impl RawBandwidth {
    fn check(self) -> Result<Bandwidth, Error> {
        let number = |field: &str, given, most| {
            let value = value::whole(field, given, 1, most)?;
            Ok::<_, Error>(value.and_then(|value| u32::try_from(value).ok()))
        };
        Ok(Bandwidth {
            egress_mbits: number("bandwidth.egress_mbits", self.egress_mbits, 30_000)?,
            ingress_mbits: number("bandwidth.ingress_mbits", self.ingress_mbits, 30_000)?,
            burst_kib: number("bandwidth.burst", self.burst, 1 << 20)?,
        })
    }
}

impl RawLogging {
    /// `driver` is the older name of `type`; `type` has precedence.
    fn check(self) -> Logging {
        let driver = text(self.r#type).or_else(|| text(self.driver));
        Logging {
            driver: driver.unwrap_or_else(|| "json-file".into()),
            config: merged(self.config),
        }
    }
}

/// `soft` or `soft:hard`.
fn ulimit((name, value): (String, String)) -> Result<Ulimit, Error> {
    let field = format!("ulimit.{name}");
    let wrong = || {
        refused(
            &field,
            &value,
            "must be `soft` or `soft:hard`, each a whole number or -1",
        )
    };
    let (soft, hard) = value.split_once(':').unwrap_or((&value, &value));
    let number = |text: &str| {
        let number = text.parse::<i64>().ok();
        number.filter(|number| *number >= -1).ok_or_else(wrong)
    };
    let (soft, hard) = (number(soft)?, number(hard)?);
    if hard != -1 && (soft == -1 || soft > hard) {
        return Err(refused(
            &field,
            &value,
            "the soft limit must not exceed the hard limit",
        ));
    }
    Ok(Ulimit { name, soft, hard })
}

/// Jobs cannot set labels that Nomad or the driver uses.
fn labels(given: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, Error> {
    const RESERVED: [&str; 2] = ["dev.polydev.", "com.hashicorp.nomad."];
    let reserved = |label: &&String| RESERVED.iter().any(|prefix| label.starts_with(prefix));
    match given.keys().find(reserved) {
        Some(label) => Err(refused(
            "labels",
            label,
            format!("names must not begin with {}", RESERVED.join(" or ")),
        )),
        None => Ok(given),
    }
}
