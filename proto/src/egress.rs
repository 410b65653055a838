//! What the containers of a slot may reach beside their model, as a job's `egress` block says.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
    sync::LazyLock,
};

use ipnet::IpNet;

/// Stands for a network interface, with which a container reaches all public addresses.
pub const INTERNET: &str = "internet";

/// Most rules of one list.
pub const MAX_RULES: usize = 200;

/// Longest name of a host (RFC 1035, section 2.3.4).
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

/// Where clouds tell a machine its secrets: Alibaba Cloud ("Instance metadata"), Azure ("What is IP
/// address 168.63.129.16"), most clouds ("Instance metadata"), and AWS for containers ("Task IAM
/// role"). Only a rule for the very address opens one: operators open networks around them.
pub const METADATA_V4: [&str; 4] = [
    "100.100.100.200/32",
    "168.63.129.16/32",
    "169.254.169.254/32",
    "169.254.170.2/32",
];
/// The same for IPv6: AWS ("Use the Instance Metadata Service").
const METADATA_V6: [&str; 1] = ["fd00:ec2::254/128"];

/// IPv4 networks that are not public (RFC 6890). Only a rule that names one, or a part of one,
/// opens it. 198.18.0.0/15, for tests between networks, is not among them.
pub const CLOSED_V4: [&str; 10] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "224.0.0.0/4",
    "240.0.0.0/4",
];
/// The same for IPv6, and those that lead to IPv4 by a way of their own (6to4, Teredo).
const CLOSED_V6: [&str; 8] = [
    "::/96",
    "64:ff9b:1::/48",
    "2001::/32",
    "2002::/16",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
];

/// A destination that is allowed: `HOST`, or `HOST:PORT` for one port. The host is a name,
/// `*.` before a name for all names below it, `*` for every name, an address, or a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    hosts: Hosts,
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Hosts {
    EveryName,
    Name(String),
    Below(String),
    Network(IpNet),
}

/// Text that is not a [`Rule`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotARule {
    #[error(
        "must be `internet` alone, or HOST or HOST:PORT with a name, `*.NAME`, `*`, an address or a network"
    )]
    Form,
    #[error("must not have bits behind its prefix; the network is {0}")]
    Bits(IpNet),
}

impl Rule {
    /// Whether connections to this name are allowed, if its address is too.
    #[must_use]
    pub fn names(&self, name: &str, port: u16) -> bool {
        let is_named = match &self.hosts {
            Hosts::EveryName => true,
            Hosts::Name(known) => known == name,
            Hosts::Below(known) => {
                let above = name.strip_suffix(known.as_str());
                above.is_some_and(|above| above.len() > 1 && above.ends_with('.'))
            }
            Hosts::Network(_) => false,
        };
        is_named && self.has(port)
    }

    /// Whether connections to this address are allowed. A network that is wider than one of
    /// the closed ones does not open it.
    #[must_use]
    pub fn covers(&self, address: IpAddr, port: u16) -> bool {
        let address = canonical(address);
        let Hosts::Network(network) = &self.hosts else {
            return false;
        };
        let opens = || closed(address).is_none_or(|closed| closed.contains(network));
        self.has(port) && network.contains(&address) && opens()
    }

    /// Whether the rule is for one address alone.
    #[must_use]
    pub fn is_one_address(&self) -> bool {
        matches!(&self.hosts, Hosts::Network(net) if net.prefix_len() == net.max_prefix_len())
    }

    fn has(&self, port: u16) -> bool {
        self.port.is_none_or(|known| known == port)
    }
}

impl FromStr for Rule {
    type Err = NotARule;

    fn from_str(text: &str) -> Result<Self, NotARule> {
        let (host, port) = split(text).ok_or(NotARule::Form)?;
        let network = host.parse().ok();
        let network = network.or_else(|| host.parse::<IpAddr>().ok().map(IpNet::from));
        let hosts = match (network, host.strip_prefix("*.")) {
            _ if host == INTERNET => return Err(NotARule::Form),
            (Some(network), _) if network != network.trunc() => {
                return Err(NotARule::Bits(network.trunc()));
            }
            // Connections are compared with the IPv4 address that it stands for.
            (Some(network), _) if canonical(network.addr()) != network.addr() => {
                return Err(NotARule::Form);
            }
            (Some(network), _) => Hosts::Network(network),
            (None, Some(below)) => Hosts::Below(name(below).ok_or(NotARule::Form)?),
            (None, None) if host == "*" => Hosts::EveryName,
            (None, None) => Hosts::Name(name(host).ok_or(NotARule::Form)?),
        };
        Ok(Self { hosts, port })
    }
}

/// Splits `HOST` or `HOST:PORT`; an IPv6 host with a port is in brackets.
fn split(text: &str) -> Option<(&str, Option<u16>)> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            let port = match port {
                "" => None,
                port => Some(port.strip_prefix(':')?),
            };
            (host, port)
        }
        None => match text.split_once(':') {
            Some((_, rest)) if rest.contains(':') => (text, None),
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    Some((host, port.map(port_number).transpose().ok()?))
}

fn port_number(text: &str) -> Result<u16, NotARule> {
    let number = text.parse().ok().filter(|port| *port > 0);
    number.ok_or(NotARule::Form)
}

/// The name in lower case; `None` if it is no name of a host. A name whose last label is a
/// number could be read as an address.
fn name(text: &str) -> Option<String> {
    let is_label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    let last = text.rsplit('.').next()?;
    let is_number = last.starts_with(|first: char| first.is_ascii_digit());
    let is_name = text.len() <= MAX_NAME && !is_number && text.split('.').all(is_label);
    is_name.then(|| text.to_ascii_lowercase())
}

/// A host that a container asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// In lower case.
    Name(String),
    Address(IpAddr),
}

impl Host {
    /// Reads the host of a URL; an IPv6 address may be in brackets. `None` if it is neither
    /// an address nor a name.
    #[must_use]
    pub fn read(text: &str) -> Option<Self> {
        let bare = text
            .strip_prefix('[')
            .and_then(|text| text.strip_suffix(']'));
        match bare.unwrap_or(text).parse::<IpAddr>() {
            Ok(address) => Some(Self::Address(address)),
            // A name may end with a dot, which says that it is complete.
            Err(_) => name(text.strip_suffix('.').unwrap_or(text)).map(Self::Name),
        }
    }
}

/// Whether connections to this address need a rule that names its network.
#[must_use]
pub fn is_closed(address: IpAddr) -> bool {
    closed(canonical(address)).is_some()
}

/// The closed network that an address is in.
fn closed(address: IpAddr) -> Option<IpNet> {
    static CLOSED: LazyLock<Vec<IpNet>> = LazyLock::new(|| {
        // The first one that fits counts.
        let metadata = METADATA_V4.iter().chain(&METADATA_V6);
        let networks = metadata.chain(&CLOSED_V4).chain(&CLOSED_V6);
        let networks = networks.map(|network| network.parse());
        networks
            .collect::<Result<_, _>>()
            .expect("they are networks")
    });
    let mut networks = CLOSED.iter();
    networks.find(|network| network.contains(&address)).copied()
}

/// The IPv4 address that an IPv6 address stands for (RFC 4291, section 2.5.5.2; RFC 6052,
/// section 2.1), or the address itself.
#[must_use]
pub fn canonical(address: IpAddr) -> IpAddr {
    const NAT64: Ipv6Addr = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0);
    match address.to_canonical() {
        IpAddr::V6(v6) if v6.octets()[..12] == NAT64.octets()[..12] => {
            let [.., a, b, c, d] = v6.octets();
            Ipv4Addr::new(a, b, c, d).into()
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rule(text: &str) -> Rule {
        text.parse()
            .unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn a_network_around_it_does_not_open_an_address_with_a_machines_secrets() {
        for (network, secrets) in [
            ("100.64.0.0/10", "100.100.100.200"),
            ("0.0.0.0/0", "168.63.129.16"),
            ("169.254.0.0/16", "169.254.169.254"),
            ("fc00::/7", "fd00:ec2::254"),
            ("fd00:ec2::/64", "fd00:ec2::254"),
        ] {
            assert!(!rule(network).covers(address(secrets), 80), "{network}");
            assert!(rule(secrets).covers(address(secrets), 80));
        }
        assert!(rule("100.64.0.0/10").covers(address("100.64.0.1"), 80));
    }

    #[test]
    fn a_name_is_itself_and_a_star_stands_for_what_is_below() {
        let host = rule("GitHub.com:443");
        assert!(host.names("github.com", 443));
        assert!(!host.names("github.com", 80) && !host.names("api.github.com", 443));
        let below = rule("*.github.com");
        assert!(below.names("api.github.com", 1) && below.names("a.b.github.com", 2));
        for other in [
            "github.com",
            ".github.com",
            "evilgithub.com",
            "github.com.evil.example",
        ] {
            assert!(!below.names(other, 443), "{other}");
        }
        assert!(rule("*:443").names("anything.example", 443));
        assert!(!rule("10.0.0.0/8").names("10.0.0.1", 443));
    }

    #[test]
    fn a_network_opens_what_it_names_and_nothing_wider() {
        let public = rule("0.0.0.0/0:443");
        assert!(public.covers(address("93.184.216.34"), 443));
        for closed in [
            "10.1.2.3",
            "127.0.0.1",
            "169.254.169.254",
            "0.0.0.0",
            "224.0.0.1",
        ] {
            assert!(!public.covers(address(closed), 443), "{closed}");
            assert!(is_closed(address(closed)), "{closed}");
            assert!(rule(closed).covers(address(closed), 443), "{closed}");
        }
        let private = rule("10.1.0.0/16:5432");
        assert!(private.covers(address("10.1.2.3"), 5432));
        assert!(!private.covers(address("10.1.2.3"), 22));
        assert!(!private.covers(address("10.2.0.1"), 5432));
        assert!(rule("[fd00::/8]:22").covers(address("fd00::1"), 22));
        assert!(!rule("::/0").covers(address("fd00::1"), 22));
        assert!(rule("::/0").covers(address("2606:2800::1"), 22));
    }

    #[test]
    fn an_address_in_the_form_of_another_is_the_same_address() {
        for hidden in [
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
        ] {
            assert!(is_closed(address(hidden)), "{hidden}");
            assert!(!rule("::/0").covers(address(hidden), 80), "{hidden}");
        }
        assert!(!is_closed(address("64:ff9b::5db8:d822")));
        assert!(rule("10.0.0.0/8").covers(address("::ffff:10.0.0.1"), 80));
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for bad in [
            "",
            "*.",
            "a..b",
            "host:",
            "host:0",
            "host:65536",
            "host:https",
            "a b",
            "*.*.com",
            "https://github.com",
            "github.com/path",
            "127.1",
            "1.2.3.4.5",
            "0x7f000001.1",
            "10.0.0.0/33",
            "[::1",
            "[::1]443",
            "user@host",
            "internet:443:1",
            "internet",
            "::ffff:10.0.0.1",
            "64:ff9b::/96",
        ] {
            assert_eq!(bad.parse::<Rule>(), Err(NotARule::Form), "{bad}");
        }
        let bits = "10.1.2.3/8".parse::<Rule>().unwrap_err();
        assert!(
            bits.to_string().ends_with("the network is 10.0.0.0/8"),
            "{bits}"
        );
    }

    #[test]
    fn a_host_is_an_address_or_a_name() {
        assert_eq!(Host::read("[::1]"), Some(Host::Address(address("::1"))));
        assert_eq!(
            Host::read("10.0.0.1"),
            Some(Host::Address(address("10.0.0.1")))
        );
        assert_eq!(
            Host::read("GitHub.com."),
            Some(Host::Name("github.com".into()))
        );
        for bad in ["", ".", "127.1", "2130706433", "a_b..c", "a%00b"] {
            assert_eq!(Host::read(bad), None, "{bad}");
        }
    }

    proptest! {
        /// Whatever a wide rule says, what is not public stays closed.
        #[test]
        fn no_rule_wider_than_a_closed_network_opens_it(bits in any::<u32>(), prefix in 0_u8..4) {
            let address = Ipv4Addr::from(bits);
            let network = IpNet::new(address.into(), prefix).expect("a prefix").trunc();
            let covered = rule(&network.to_string()).covers(address.into(), 443);
            prop_assert_eq!(covered, !is_closed(address.into()));
        }

        #[test]
        fn no_text_breaks_the_reader(text in ".{0,40}") {
            let _rule = text.parse::<Rule>();
            let _host = Host::read(&text);
        }
    }
}
