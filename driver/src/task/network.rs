//! A plain task's network: one of Docker's modes, or the group's namespace.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use polydev_proto::driver::{
    HostsConfig, TaskConfig, network_isolation_spec::NetworkIsolationMode,
};

use crate::{
    config::{Mount, MountKind, Task},
    docker::{Network, Published},
    identity::LABEL_SANDBOX,
    limits::{BURST, Rates},
};

/// Why a task cannot have the network it requests.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{field}` is `{label}`: no `network` block of the job has a port with this label")]
    UnknownPort { field: &'static str, label: String },
    #[error("`{field}` is set, but `network_mode` is `{mode}`: must be a user-defined network")]
    Address { field: &'static str, mode: String },
    #[error(
        "`bandwidth` is set, but a task with `network_mode` `{mode}` has no interface of its own to limit"
    )]
    NoInterface { mode: String },
    #[error("`network_mode` is `{mode}`: network aliases require a user-defined network")]
    Aliases { mode: String },
    #[error("`{field}` is set, but the group's network already has its own")]
    Shared { field: &'static str },
    #[error(
        "`{field}` is set, and the group has a network: must be a task with a network of its own"
    )]
    Outside { field: &'static str },
    #[error("`extra_hosts` contains `host-gateway`, but a group's network has no Docker gateway")]
    Gateway,
    #[error("cannot write `{path}`")]
    Write { path: PathBuf, source: io::Error },
}

/// A task's place in the network.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) network: Network,
    pub(super) ports: Vec<Published>,
    /// Of its interface.
    pub(super) rates: Option<Rates>,
    /// Of what passes the broker, each way.
    pub(super) broker_rate: u64,
    /// Network files that a shared namespace does not provide.
    pub(super) files: Vec<Mount>,
    /// Whether its address is its own, for services with `address_mode = "driver"`.
    pub(super) has_address: bool,
    /// Whether the network is user-defined, so that other members know its addresses.
    pub(super) is_users_own: bool,
    /// What the job's author should know, for the task's events.
    pub(super) notes: Vec<String>,
}

/// `enforce_mbits` makes a limit of the bookkeeping in older jobs. `folder` is created for the
/// files of a shared namespace; `resolv_conf` contains the node's name servers.
pub(super) fn place(
    task: &TaskConfig,
    options: &Task,
    enforce_mbits: bool,
    folder: &Path,
    resolv_conf: &Path,
) -> Result<Place, Error> {
    let group = task.network_isolation_spec.as_ref().filter(|spec| {
        spec.mode() == NetworkIsolationMode::Group || spec.mode() == NetworkIsolationMode::None
    });
    let sandbox = group.and_then(|spec| spec.labels.get(LABEL_SANDBOX));
    if let Some(field) = options.brokered_by().filter(|_| sandbox.is_some()) {
        return Err(Error::Outside { field });
    }
    let mode = match (&options.network_mode, sandbox) {
        _ if options.egress.is_some() => "none".into(),
        (Some(mode), _) => mode.clone(),
        (None, Some(container)) => format!("container:{container}"),
        (None, None) => "bridge".into(),
    };
    let is_shared = mode.starts_with("container:");
    let is_published = !is_shared && mode != "host" && mode != "none";
    let is_users_own = is_published && mode != "bridge" && mode != "default";
    if !options.network_aliases.is_empty() && !is_users_own {
        return Err(Error::Aliases { mode });
    }
    let addresses = [
        ("ipv4_address", options.ipv4_address.is_some()),
        ("ipv6_address", options.ipv6_address.is_some()),
    ];
    if let Some((field, _)) = addresses.into_iter().find(|(_, is_set)| *is_set)
        && !is_users_own
    {
        return Err(Error::Address { field, mode });
    }
    if is_shared && options.hostname.is_some() {
        return Err(Error::Shared { field: "hostname" });
    }
    let is_group = is_shared && options.network_mode.is_none();
    let mbits = mbits(task).filter(|_| enforce_mbits);
    let rates = rates(options, mbits);
    let broker_rate = broker_rate(rates.as_ref());
    let has_interface = is_published || is_group;
    // Without a network, the broker has the rate.
    if options.bandwidth.is_set() && !has_interface && options.egress.is_none() {
        return Err(Error::NoInterface { mode });
    }
    let rates = rates.filter(|_| has_interface);
    let mut notes = Vec::new();
    if let Some(mbits) = mbits.filter(|_| !options.bandwidth.is_set()) {
        notes.push(if has_interface || options.egress.is_some() {
            format!("Limited to {mbits} Mbit/s by `mbits` of its network, as the plugin's `enforce_mbits` says")
        } else {
            format!("`mbits` of its network has no effect: with `network_mode` `{mode}` it has no interface of its own")
        });
    }
    let offered = task.resources.iter().flat_map(|given| &given.ports);
    let offered: Vec<&str> = offered.map(|port| &*port.label).collect();
    let takes_none = options.ports.is_empty() && options.port_map.is_empty();
    if options.network_mode.is_none() && is_published && takes_none && !offered.is_empty() {
        notes.push(format!(
            "The group's network has the ports {}, and none of them leads to this task: set `ports`, or `network_mode = \"host\"`",
            offered.join(", ")
        ));
    }
    if !options.port_map.is_empty() {
        notes.push(
            "`port_map` is an older form: write `ports`, and `to` in the group's `network` block"
                .into(),
        );
    }
    let dns = task.dns.clone().unwrap_or_default();
    let first =
        |own: &Vec<String>, other: Vec<String>| if own.is_empty() { other } else { own.clone() };
    let mut network = Network {
        mode,
        is_shared,
        servers: first(&options.dns_servers, dns.servers),
        searches: first(&options.dns_search_domains, dns.searches),
        options: first(&options.dns_options, dns.options),
    };
    let mut files = Vec::new();
    if is_group {
        if options
            .extra_hosts
            .iter()
            .any(|entry| entry.ends_with(":host-gateway"))
        {
            return Err(Error::Gateway);
        }
        fs::create_dir_all(folder).map_err(|source| Error::Write {
            path: folder.to_owned(),
            source,
        })?;
        let hosts = group.and_then(|spec| spec.hosts_config.as_ref());
        files.push(file(
            folder.join("hosts"),
            "/etc/hosts",
            &hosts_file(hosts, &options.extra_hosts),
        )?);
        let text = resolv_conf_file(&network, resolv_conf);
        if !text.is_empty() {
            files.push(file(folder.join("resolv.conf"), "/etc/resolv.conf", &text)?);
        }
    }
    if is_shared {
        // Docker rejects these options for the namespace of another container.
        (network.servers, network.searches, network.options) = Default::default();
    }
    Ok(Place {
        ports: if is_published {
            ports(task, options)?
        } else {
            Vec::new()
        },
        has_address: is_published,
        is_users_own,
        network,
        rates,
        broker_rate,
        files,
        notes,
    })
}

/// The lower of the two rates in bytes per second; practically unlimited without one.
fn broker_rate(rates: Option<&Rates>) -> u64 {
    const UNLIMITED: u64 = 1 << 40;
    let mbits = rates.into_iter();
    let mbits = mbits.flat_map(|rates| [rates.ingress_mbits, rates.egress_mbits]);
    let least = mbits.flatten().min();
    least.map_or(UNLIMITED, |mbits| u64::from(mbits) * 125_000)
}

/// In the task's own `network` block, as jobs had it before Nomad 1.0.
fn mbits(task: &TaskConfig) -> Option<u32> {
    let networks = task
        .resources
        .as_ref()
        .and_then(|given| given.allocated_resources.as_ref())
        .map(|given| &given.networks);
    let mut mbits = networks.into_iter().flatten();
    mbits.find_map(|network| u32::try_from(network.mbits).ok().filter(|mbits| *mbits > 0))
}

/// From the `bandwidth` block, or else from `mbits`.
fn rates(options: &Task, mbits: Option<u32>) -> Option<Rates> {
    let bandwidth = options.bandwidth;
    let ingress_mbits = bandwidth.ingress_mbits.or(mbits);
    let egress_mbits = bandwidth.egress_mbits.or(mbits);
    (ingress_mbits.is_some() || egress_mbits.is_some()).then(|| Rates {
        ingress_mbits,
        egress_mbits,
        burst: bandwidth.burst_kib.map_or(BURST, |kib| kib << 10),
    })
}

/// The ports that the host forwards: those that the task names. An old job with a network
/// block in its task gets all its ports, under their own numbers or those of its `port_map`.
fn ports(task: &TaskConfig, options: &Task) -> Result<Vec<Published>, Error> {
    let port = |number: i32| u16::try_from(number).unwrap_or_default();
    let given = task.resources.as_ref();
    let mut published = Vec::new();
    let of_task = given.and_then(|given| given.allocated_resources.as_ref());
    let of_task = of_task.into_iter().flat_map(|given| &given.networks);
    for network in of_task.filter(|_| options.ports.is_empty()) {
        let all = network.reserved_ports.iter().chain(&network.dynamic_ports);
        published.extend(all.map(|own| {
            let inside = options.port_map.get(&own.label).copied();
            Published {
                label: own.label.clone(),
                host_ip: network.ip.clone(),
                host_port: port(own.value),
                container_port: inside.unwrap_or_else(|| port(own.value)),
            }
        }));
    }
    let mapped = options.port_map.iter();
    let mapped = mapped.map(|(label, inside)| ("port_map", label, Some(*inside)));
    let named = options.ports.iter().map(|label| ("ports", label, None));
    for (field, label, inside) in named.chain(mapped) {
        if published.iter().any(|port| port.label == *label) {
            continue;
        }
        let mapping = given.and_then(|given| given.ports.iter().find(|port| port.label == *label));
        let mapping = mapping.ok_or_else(|| Error::UnknownPort {
            field,
            label: label.clone(),
        })?;
        let own = if mapping.to > 0 {
            mapping.to
        } else {
            mapping.value
        };
        published.push(Published {
            label: label.clone(),
            host_ip: mapping.host_ip.clone(),
            host_port: port(mapping.value),
            container_port: inside.unwrap_or_else(|| port(own)),
        });
    }
    Ok(published)
}

fn hosts_file(own: Option<&HostsConfig>, extra: &[String]) -> String {
    let mut text = String::from(
        "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n\
         fe00::0 ip6-localnet\nff00::0 ip6-mcastprefix\nff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n",
    );
    if let Some(HostsConfig { hostname, address }) = own.filter(|own| !own.address.is_empty()) {
        text += &format!("{address} {hostname}\n");
    }
    for (name, address) in extra.iter().filter_map(|entry| entry.split_once(':')) {
        text += &format!("{} {name}\n", address.trim_matches(['[', ']']));
    }
    text
}

/// Empty if the namespace's own file is enough.
fn resolv_conf_file(network: &Network, node: &Path) -> String {
    if [&network.servers, &network.searches, &network.options]
        .iter()
        .all(|list| list.is_empty())
    {
        return String::new();
    }
    let mut servers: Vec<String> = network
        .servers
        .iter()
        .map(|server| format!("nameserver {server}\n"))
        .collect();
    if servers.is_empty() {
        let text = fs::read_to_string(node).unwrap_or_default();
        let lines = text.lines().filter(|line| line.starts_with("nameserver"));
        servers.extend(lines.map(|line| format!("{line}\n")));
    }
    let line = |word: &str, list: &[String]| match list {
        [] => String::new(),
        list => format!("{word} {}\n", list.join(" ")),
    };
    let rest = [
        line("search", &network.searches),
        line("options", &network.options),
    ];
    servers.into_iter().chain(rest).collect()
}

fn file(path: PathBuf, target: &str, text: &str) -> Result<Mount, Error> {
    fs::write(&path, text).map_err(|source| Error::Write {
        path: path.clone(),
        source,
    })?;
    Ok(Mount {
        target: target.into(),
        readonly: false,
        kind: MountKind::Bind {
            source: path.to_string_lossy().into_owned(),
            propagation: None,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use polydev_proto::driver::{
        AllocatedTaskResources, NetworkIsolationSpec, NetworkPort, NetworkResource, PortMapping,
        Resources,
    };

    /// For a task outside any group's namespace.
    fn bare(task: &TaskConfig, options: &Task) -> Result<Place, Error> {
        place(
            task,
            options,
            true,
            Path::new("/nowhere"),
            Path::new("/nowhere"),
        )
    }

    fn with_ports() -> TaskConfig {
        let network = NetworkResource {
            ip: "127.0.0.1".into(),
            mbits: 7,
            reserved_ports: vec![NetworkPort {
                label: "main".into(),
                value: 6000,
            }],
            ..Default::default()
        };
        let mapping = PortMapping {
            label: "http".into(),
            value: 20_000,
            to: 8080,
            host_ip: "10.0.0.1".into(),
        };
        TaskConfig {
            resources: Some(Resources {
                allocated_resources: Some(AllocatedTaskResources {
                    networks: vec![network],
                    ..Default::default()
                }),
                ports: vec![mapping],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// C090, C091.
    #[test]
    fn ports_are_published_by_label_or_under_their_own_number() {
        let by_label = Task {
            ports: vec!["http".into()],
            ..Default::default()
        };
        let place_of = |options: &Task| bare(&with_ports(), options);
        let published = place_of(&by_label).unwrap().ports;
        let [port] = &published[..] else {
            panic!("{published:?}")
        };
        assert_eq!(
            (port.host_port, port.container_port, &*port.host_ip),
            (20_000, 8080, "10.0.0.1")
        );
        let own = place_of(&Task::default()).unwrap().ports;
        assert_eq!((own[0].host_port, own[0].container_port), (6000, 6000));
        let unknown = Task {
            ports: vec!["db".into()],
            ..Default::default()
        };
        assert!(matches!(place_of(&unknown), Err(Error::UnknownPort { .. })));
    }

    #[test]
    fn bandwidth_comes_from_the_option_or_from_mbits_and_needs_an_interface() {
        let mbits = bare(&with_ports(), &Task::default())
            .unwrap()
            .rates
            .unwrap();
        assert_eq!(
            (mbits.ingress_mbits, mbits.egress_mbits),
            (Some(7), Some(7))
        );
        let mut options = Task::default();
        options.bandwidth.egress_mbits = Some(3);
        let rates = bare(&TaskConfig::default(), &options)
            .unwrap()
            .rates
            .unwrap();
        assert_eq!((rates.ingress_mbits, rates.egress_mbits), (None, Some(3)));
        for mode in ["host", "none", "container:x"] {
            options.network_mode = Some(mode.into());
            let refused = bare(&TaskConfig::default(), &options).unwrap_err();
            assert!(refused.to_string().contains("`bandwidth`"), "{refused}");
        }
    }

    /// C068, and the hosts file of a group's network.
    #[test]
    fn a_groups_network_brings_its_own_files() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("web")).unwrap();
        let task = TaskConfig {
            name: "web".into(),
            alloc_dir: folder.path().to_string_lossy().into_owned(),
            network_isolation_spec: Some(NetworkIsolationSpec {
                mode: NetworkIsolationMode::Group.into(),
                labels: [(LABEL_SANDBOX.to_owned(), "abc".to_owned())].into(),
                hosts_config: Some(HostsConfig {
                    hostname: "h".into(),
                    address: "172.26.64.2".into(),
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let options = Task {
            dns_servers: vec!["8.8.8.8".into()],
            dns_search_domains: vec!["example.org".into()],
            dns_options: vec!["ndots:2".into()],
            extra_hosts: vec!["db:10.0.0.5".into()],
            ..Default::default()
        };
        let place = place(
            &task,
            &options,
            false,
            &folder.path().join("web"),
            Path::new("/nowhere"),
        )
        .unwrap();
        assert_eq!(place.network.mode, "container:abc");
        assert!(place.ports.is_empty() && place.network.servers.is_empty());
        let read =
            |name: &str| std::fs::read_to_string(folder.path().join("web").join(name)).unwrap();
        assert_eq!(
            read("resolv.conf"),
            "nameserver 8.8.8.8\nsearch example.org\noptions ndots:2\n"
        );
        assert!(read("hosts").ends_with("172.26.64.2 h\n10.0.0.5 db\n"));
        assert_eq!(place.files.len(), 2);
    }
}
