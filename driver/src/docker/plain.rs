//! A plain task's container, as Docker's API describes it.

use std::collections::{BTreeMap, HashMap};

use bollard::models::{
    ContainerCreateBody, DeviceMapping, EndpointIpamConfig, EndpointSettings, HealthConfig,
    HostConfig, HostConfigCgroupnsModeEnum, HostConfigLogConfig, Mount as ApiMount,
    MountBindOptions, MountBindOptionsPropagationEnum, MountTmpfsOptions, MountType,
    MountVolumeOptions, MountVolumeOptionsDriverConfig, NetworkingConfig, PortBinding,
    ResourcesUlimits, RestartPolicy, RestartPolicyNameEnum,
};

use polydev_proto::broker::PORT;

use super::container::{INIT, LINK, SOCKET, bind, proxy_variables};
use crate::config::{Capabilities, Device, Logging, Mount, MountKind, Task};

/// A plain task's container: its options, and what follows from the rest of the job.
#[derive(Debug, Clone)]
pub struct PlainSpec<'a> {
    pub name: String,
    pub options: &'a Task,
    pub labels: BTreeMap<String, String>,
    pub env: &'a BTreeMap<String, String>,
    /// Empty for the image's user.
    pub user: &'a str,
    pub capabilities: Capabilities,
    /// Program and folder of polydev-init on the host; without them the program of
    /// the job or the image is process 1.
    pub init: Option<InitMounts<'a>>,
    pub resources: Resources,
    /// In Docker's short form: first Nomad's, then the job's.
    pub binds: Vec<String>,
    pub mounts: Vec<Mount>,
    pub devices: Vec<Device>,
    pub network: Network,
    pub ports: Vec<Published>,
    pub logging: Logging,
    pub pids_limit: u32,
    /// Whether no program may become another user; the job may say so itself.
    pub no_new_privileges: bool,
    pub runtime: Option<&'a str>,
}

/// See [`super::ContainerSpec`].
#[derive(Debug, Clone, Copy)]
pub struct InitMounts<'a> {
    pub init: &'a std::path::Path,
    pub link: &'a std::path::Path,
}

/// Resources in the units of Docker and the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resources {
    pub cpu_shares: i64,
    /// Microseconds; a quota of 0 is unlimited.
    pub cpu_period: i64,
    pub cpu_quota: i64,
    /// CPU list such as `0-1,3`; empty for every CPU.
    pub cpuset: String,
    /// Bytes; 0 is unlimited.
    pub memory: i64,
    pub memory_reservation: i64,
}

/// The container's place in the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Docker's network mode.
    pub mode: String,
    /// Whether another container provides the network's files.
    pub is_shared: bool,
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// A port of the container that the host forwards, for TCP and UDP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Of the port in the job.
    pub label: String,
    pub host_ip: String,
    pub host_port: u16,
    pub container_port: u16,
}

impl PlainSpec<'_> {
    pub(super) fn body(&self) -> ContainerCreateBody {
        let Self {
            options, resources, ..
        } = self;
        // With init, the driver has init start the image's program.
        let (entrypoint, command) = match self.init {
            Some(_) => {
                let port = options.is_brokered().then(|| PORT.to_string());
                let init = [INIT.into(), SOCKET.into()].into_iter().chain(port);
                (Some(init.collect()), Some(vec![]))
            }
            None => {
                let command: Vec<String> = options
                    .command
                    .iter()
                    .chain(&options.args)
                    .cloned()
                    .collect();
                (
                    options.entrypoint.clone(),
                    (!command.is_empty()).then_some(command),
                )
            }
        };
        // The job's own variables hold.
        let is_given = |name: &str| self.env.contains_key(name);
        let proxy = options.egress.as_ref().map(|_| proxy_variables());
        let proxy = proxy.into_iter().flatten();
        let proxy = proxy.filter(|variable| !variable.split('=').next().is_some_and(is_given));
        let own = self
            .env
            .iter()
            .map(|(name, value)| format!("{name}={value}"));
        let env: Vec<String> = proxy.chain(own).collect();
        let is_docker_tty = options.tty && self.init.is_none();
        ContainerCreateBody {
            image: Some(options.image.clone()),
            entrypoint,
            cmd: command,
            user: none_if_empty(self.user),
            env: Some(env),
            working_dir: options.work_dir.clone(),
            hostname: options.hostname.clone().filter(|_| !self.network.is_shared),
            labels: Some(self.labels.clone().into_iter().collect()),
            tty: Some(is_docker_tty),
            open_stdin: Some(options.interactive && self.init.is_none()),
            exposed_ports: Some(self.port_names().map(|(name, _)| name).collect()),
            healthcheck: options.healthchecks_disabled.then(|| HealthConfig {
                test: Some(vec!["NONE".into()]),
                ..Default::default()
            }),
            networking_config: self.endpoint(),
            host_config: Some(HostConfig {
                cpu_shares: Some(resources.cpu_shares),
                cpu_period: Some(resources.cpu_period),
                cpu_quota: Some(resources.cpu_quota),
                cpuset_cpus: none_if_empty(&resources.cpuset),
                memory: Some(resources.memory),
                // Equal to the memory limit, so there is no swap.
                memory_swap: Some(resources.memory),
                memory_reservation: Some(resources.memory_reservation),
                pids_limit: Some(self.pids_limit.into()),
                oom_score_adj: Some(options.oom_score_adj),
                shm_size: options.shm_size,
                ulimits: Some(self.ulimits()),
                sysctls: Some(options.sysctl.clone().into_iter().collect()),
                storage_opt: (!options.storage_opt.is_empty())
                    .then(|| options.storage_opt.clone().into_iter().collect()),
                privileged: Some(options.privileged),
                cap_add: Some(upper(&self.capabilities.add)),
                cap_drop: Some(upper(&self.capabilities.drop)),
                security_opt: Some(self.security_opt()),
                readonly_rootfs: Some(options.readonly_rootfs),
                runtime: self.runtime.map(str::to_owned),
                group_add: Some(options.group_add.clone()),
                pid_mode: options.pid_mode.clone(),
                ipc_mode: options.ipc_mode.clone(),
                uts_mode: options.uts_mode.clone(),
                userns_mode: options.userns_mode.clone(),
                cgroupns_mode: options.cgroupns.as_deref().map(|mode| match mode {
                    "host" => HostConfigCgroupnsModeEnum::HOST,
                    _ => HostConfigCgroupnsModeEnum::PRIVATE,
                }),
                init: Some(false),
                binds: Some(self.binds.clone()),
                volume_driver: options.volume_driver.clone(),
                mounts: Some(self.mounts()),
                devices: Some(self.devices.iter().map(device).collect()),
                network_mode: Some(self.network.mode.clone()),
                port_bindings: Some(self.port_bindings()),
                dns: Some(self.network.servers.clone()),
                dns_search: Some(self.network.searches.clone()),
                dns_options: Some(self.network.options.clone()),
                extra_hosts: Some(options.extra_hosts.clone()).filter(|_| !self.network.is_shared),
                log_config: Some(HostConfigLogConfig {
                    typ: Some(self.logging.driver.clone()),
                    config: Some(self.logging.config.clone().into_iter().collect()),
                }),
                restart_policy: Some(RestartPolicy {
                    name: Some(RestartPolicyNameEnum::NO),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn security_opt(&self) -> Vec<String> {
        let ours = self
            .no_new_privileges
            .then(|| "no-new-privileges=true".to_owned());
        self.options
            .security_opt
            .iter()
            .cloned()
            .chain(ours)
            .collect()
    }

    fn ulimits(&self) -> Vec<ResourcesUlimits> {
        let limits = self.options.ulimits.iter().map(|limit| ResourcesUlimits {
            name: Some(limit.name.clone()),
            soft: Some(limit.soft),
            hard: Some(limit.hard),
        });
        limits.collect()
    }

    fn mounts(&self) -> Vec<ApiMount> {
        let ours = self
            .init
            .map(|InitMounts { init, link }| [bind(init, INIT), bind(link, LINK)]);
        let ours = ours.into_iter().flatten();
        ours.chain(self.mounts.iter().map(mount)).collect()
    }

    fn port_names(&self) -> impl Iterator<Item = (String, &Published)> {
        self.ports.iter().flat_map(|port| {
            ["tcp", "udp"].map(|protocol| (format!("{}/{protocol}", port.container_port), port))
        })
    }

    /// Several host ports may lead to one container port.
    fn port_bindings(&self) -> HashMap<String, Option<Vec<PortBinding>>> {
        let mut bindings: HashMap<_, Option<Vec<_>>> = HashMap::new();
        for (name, port) in self.port_names() {
            let all = bindings.entry(name).or_default();
            all.get_or_insert_default().push(binding(port));
        }
        bindings
    }

    /// What it is in a network of the operator's.
    fn endpoint(&self) -> Option<NetworkingConfig> {
        let Task {
            network_aliases,
            ipv4_address,
            ipv6_address,
            mac_address,
            ..
        } = self.options;
        let has_address = ipv4_address.is_some() || ipv6_address.is_some();
        if network_aliases.is_empty() && !has_address && mac_address.is_none() {
            return None;
        }
        let settings = EndpointSettings {
            aliases: Some(network_aliases.clone()),
            mac_address: mac_address.clone(),
            ipam_config: has_address.then(|| EndpointIpamConfig {
                ipv4_address: ipv4_address.map(|address| address.to_string()),
                ipv6_address: ipv6_address.map(|address| address.to_string()),
                ..Default::default()
            }),
            ..Default::default()
        };
        Some(NetworkingConfig {
            endpoints_config: Some(HashMap::from([(self.network.mode.clone(), settings)])),
        })
    }
}

fn mount(mount: &Mount) -> ApiMount {
    let mut api = ApiMount {
        target: Some(mount.target.clone()),
        read_only: Some(mount.readonly),
        ..Default::default()
    };
    match &mount.kind {
        MountKind::Bind {
            source,
            propagation,
        } => {
            api.typ = Some(MountType::BIND);
            api.source = Some(source.clone());
            api.bind_options = propagation.as_ref().map(|word| MountBindOptions {
                propagation: word.parse::<MountBindOptionsPropagationEnum>().ok(),
                ..Default::default()
            });
        }
        MountKind::Volume {
            name,
            no_copy,
            labels,
            driver,
            driver_options,
        } => {
            api.typ = Some(MountType::VOLUME);
            api.source = name.clone();
            api.volume_options = Some(MountVolumeOptions {
                no_copy: Some(*no_copy),
                labels: Some(labels.clone().into_iter().collect()),
                driver_config: driver
                    .as_ref()
                    .map(|driver| MountVolumeOptionsDriverConfig {
                        name: Some(driver.clone()),
                        options: Some(driver_options.clone().into_iter().collect()),
                    }),
                ..Default::default()
            });
        }
        MountKind::Tmpfs { size, mode } => {
            api.typ = Some(MountType::TMPFS);
            api.tmpfs_options = Some(MountTmpfsOptions {
                size_bytes: *size,
                mode: *mode,
                ..Default::default()
            });
        }
    }
    api
}

fn device(device: &Device) -> DeviceMapping {
    DeviceMapping {
        path_on_host: Some(device.host_path.clone()),
        path_in_container: Some(device.container_path.clone()),
        cgroup_permissions: Some(device.permissions.clone()),
    }
}

fn binding(port: &Published) -> PortBinding {
    PortBinding {
        host_ip: none_if_empty(&port.host_ip),
        host_port: Some(port.host_port.to_string()),
    }
}

fn upper(caps: &[String]) -> Vec<String> {
    caps.iter().map(|cap| cap.to_uppercase()).collect()
}

fn none_if_empty(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}
