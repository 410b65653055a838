//! What a container may connect to beside its model, and the connections that this allows.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use nix::{ifaddrs::getifaddrs, sys::socket::SockaddrStorage};
use polydev_proto::egress::{Host, NotARule, Rule, canonical, is_closed};
use tokio::{net::TcpStream, sync::Semaphore, task::spawn_blocking, time::timeout};

/// Most names that are looked up for one container at the same time: each takes a thread, of
/// which model requests need some too.
const MAX_LOOKUPS: usize = 4;
/// Most addresses of one name that are tried.
const MAX_ADDRESSES: usize = 4;
/// How the names of bridges begin that containers are on: the driver's, and Docker's own.
const CONTAINERS: [&str; 3] = ["pd-", "docker", "br-"];
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// For each address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What a container may reach: what each of the lists allows.
#[derive(Debug, Clone)]
pub(crate) struct Egress {
    lists: Vec<Arc<List>>,
    lookups: Arc<Semaphore>,
}

#[derive(Debug)]
struct List {
    rules: Vec<Rule>,
    /// How a message names it.
    name: &'static str,
}

/// What a container asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) host: Host,
    pub(crate) port: u16,
}

/// Why a connection is not allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    #[error("not in {list}")]
    NotListed { list: &'static str },
    #[error("the address {address} is not public, and not in {list}")]
    Closed { address: IpAddr, list: &'static str },
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("cannot look up the name")]
    Lookup(#[source] io::Error),
    #[error("the name has no address")]
    NoAddress,
    #[error("cannot connect")]
    Connect(#[source] io::Error),
}

impl Egress {
    /// What the job of the container allows.
    ///
    /// # Errors
    /// [`NotARule`]
    pub(crate) fn new(allow: &[String]) -> Result<Self, NotARule> {
        Ok(Self {
            lists: vec![List::read("the job's egress.allow", allow)?.into()],
            lookups: Semaphore::new(MAX_LOOKUPS).into(),
        })
    }

    /// What is allowed here and in the list of a role, too.
    ///
    /// # Errors
    /// [`NotARule`]
    pub(crate) fn and(&self, allow: &[String]) -> Result<Self, NotARule> {
        let mut both = self.clone();
        both.lists
            .push(List::read("the role's egress", allow)?.into());
        Ok(both)
    }

    /// Connects to what a container asks for, if it is allowed. Returns the address too.
    ///
    /// # Errors
    /// [`Error`]
    ///
    /// # Cancel safety
    /// Cancelling closes the connection.
    pub(crate) async fn connect(&self, target: &Target) -> Result<(TcpStream, IpAddr), Error> {
        let mut refused = Error::NoAddress;
        for address in self.addresses(target).await? {
            let address = SocketAddr::new(address, target.port);
            match timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return Ok((stream, address.ip())),
                Ok(Err(error)) => refused = Error::Connect(error),
                Err(elapsed) => refused = Error::Connect(elapsed.into()),
            }
        }
        Err(refused)
    }

    /// The addresses of the target that are allowed.
    async fn addresses(&self, target: &Target) -> Result<Vec<IpAddr>, Error> {
        let port = target.port;
        let name = match &target.host {
            Host::Address(address) => {
                return match self.lists.iter().find(|list| !list.opens(*address, port)) {
                    None => Ok(vec![*address]),
                    Some(list) => Err(Denied::NotListed { list: list.name }.into()),
                };
            }
            Host::Name(name) => name,
        };
        if let Some(list) = self.lists.iter().find(|list| !list.names(name, port)) {
            return Err(Denied::NotListed { list: list.name }.into());
        }
        let found = self.look_up(name).await.map_err(Error::Lookup)?;
        let (mut allowed, mut closed) = (Vec::new(), None);
        for address in found {
            // Whoever answers for the name chooses its addresses.
            let needs_rule = is_closed(address) || is_own(address);
            let mut lists = self.lists.iter().filter(|_| needs_rule);
            match lists.find(|list| !list.opens(address, port)) {
                None => allowed.push(address),
                Some(list) => closed = closed.or(Some((address, list.name))),
            }
        }
        match closed {
            Some((address, list)) if allowed.is_empty() => {
                Err(Denied::Closed { address, list }.into())
            }
            _ => Ok(of_both_kinds(allowed)),
        }
    }

    async fn look_up(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        let turn = self.lookups.clone().acquire_owned();
        let host = (name.to_owned(), 0);
        let found = async {
            let turn = turn.await.map_err(io::Error::other)?;
            let found = spawn_blocking(move || {
                // Until the thread is done, whoever waits for it.
                let _turn = turn;
                host.to_socket_addrs()
            });
            Ok(found.await??.map(|address| address.ip()).collect())
        };
        timeout(LOOKUP_TIMEOUT, found).await?
    }
}

impl List {
    fn read(name: &'static str, allow: &[String]) -> Result<Self, NotARule> {
        let rules = allow.iter().map(|rule| rule.parse());
        Ok(Self {
            rules: rules.collect::<Result<_, _>>()?,
            name,
        })
    }

    fn names(&self, name: &str, port: u16) -> bool {
        self.rules.iter().any(|rule| rule.names(name, port))
    }

    /// Whether a rule opens the address. The node's own networks need a rule for the single
    /// address: its services and other containers are there, and a rule for a wider network is
    /// hardly meant for them.
    fn opens(&self, address: IpAddr, port: u16) -> bool {
        let mut covering = self.rules.iter().filter(|rule| rule.covers(address, port));
        match covering.next() {
            None => false,
            Some(first) if first.is_one_address() => true,
            Some(_) => covering.any(Rule::is_one_address) || !is_own(address),
        }
    }
}

/// The addresses to try, in turns of IPv6 and IPv4: one of the two may lead nowhere here.
fn of_both_kinds(addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let (v6, v4): (Vec<_>, Vec<_>) = addresses.into_iter().partition(IpAddr::is_ipv6);
    let turns = v6.len().max(v4.len());
    let turns = (0..turns).flat_map(|turn| [v6.get(turn), v4.get(turn)]);
    turns.flatten().copied().take(MAX_ADDRESSES).collect()
}

/// Whether an address is one of this machine's, or in the network of a bridge of Docker's. If
/// the kernel does not say, it is.
fn is_own(address: IpAddr) -> bool {
    let address = canonical(address);
    if address.is_loopback() || address.is_unspecified() {
        return true;
    }
    let Ok(mut interfaces) = getifaddrs() else {
        return true;
    };
    interfaces.any(|interface| {
        let Some(own) = interface.address.and_then(ip) else {
            return false;
        };
        let has_containers = CONTAINERS
            .iter()
            .any(|name| interface.interface_name.starts_with(name));
        let mask = interface.netmask.and_then(ip).filter(|_| has_containers);
        let network = mask.and_then(|mask| IpNet::with_netmask(own, mask).ok());
        own == address || network.is_some_and(|network| network.contains(&address))
    })
}

fn ip(address: SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| v4.ip().into());
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Name(name) => write!(f, "{name}:{}", self.port),
            Host::Address(address) => SocketAddr::new(*address, self.port).fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn addresses(allow: &[&str], host: &str, port: u16) -> Result<Vec<IpAddr>, String> {
        let allow: Vec<String> = allow.iter().map(ToString::to_string).collect();
        let egress = Egress::new(&allow).expect("rules");
        let host = Host::read(host).expect("a host");
        let found = egress.addresses(&Target { host, port }).await;
        found.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn an_address_needs_a_network_and_a_name_a_name() {
        let not_listed = || Err("not in the job's egress.allow".to_owned());
        assert_eq!(addresses(&[], "10.0.0.1", 80).await, not_listed());
        assert_eq!(addresses(&["*"], "10.0.0.1", 80).await, not_listed());
        assert_eq!(
            addresses(&["0.0.0.0/0"], "example.org", 80).await,
            not_listed()
        );
        let ten = || "10.0.0.1".parse().expect("an address");
        assert_eq!(
            addresses(&["10.0.0.0/8:80"], "10.0.0.1", 80).await,
            Ok(vec![ten()])
        );
        assert_eq!(
            addresses(&["10.0.0.0/8:80"], "10.0.0.1", 81).await,
            not_listed()
        );
    }

    #[tokio::test]
    async fn a_name_opens_no_address_that_is_not_public() {
        let refused = addresses(&["localhost"], "localhost", 80)
            .await
            .unwrap_err();
        assert!(
            refused.ends_with(" is not public, and not in the job's egress.allow"),
            "{refused}"
        );
        let found = addresses(&["localhost", "127.0.0.1"], "localhost", 80).await;
        assert_eq!(found, Ok(vec!["127.0.0.1".parse().expect("an address")]));
        let network = addresses(&["localhost", "127.0.0.0/8"], "localhost", 80).await;
        assert!(
            network.is_err(),
            "the node's own address needs a rule for itself"
        );
    }

    #[tokio::test]
    async fn a_role_takes_away_and_adds_nothing() {
        let list = |rules: &[&str]| rules.iter().map(ToString::to_string).collect::<Vec<_>>();
        let pool = Egress::new(&list(&["10.0.0.0/8", "localhost", "127.0.0.1"])).expect("rules");
        let both = pool.and(&list(&["10.1.0.0/16", "localhost", "192.0.2.1"]));
        let both = both.expect("rules");
        let denied = async |host: &str| {
            let host = Host::read(host).expect("a host");
            let found = both.addresses(&Target { host, port: 80 }).await;
            found.err().map(|error| error.to_string())
        };
        assert_eq!(denied("10.1.2.3").await, None);
        let of_role = Some("not in the role's egress".to_owned());
        assert_eq!(denied("10.2.0.1").await, of_role);
        let of_pool = Some("not in the job's egress.allow".to_owned());
        assert_eq!(denied("192.0.2.1").await, of_pool);
        let closed = denied("localhost").await.expect("it is denied");
        assert!(
            closed.ends_with(" is not public, and not in the role's egress")
                || closed.ends_with(" is not public, and not in the job's egress.allow"),
            "{closed}"
        );
    }

    #[test]
    fn an_address_is_own_in_whatever_form() {
        let own = [
            "127.0.0.1",
            "0.0.0.0",
            "::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
        ];
        for address in own {
            assert!(is_own(address.parse().expect("an address")), "{address}");
        }
        assert!(!is_own("93.184.216.34".parse().expect("an address")));
    }

    #[test]
    fn both_kinds_of_addresses_are_tried() {
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        let v6: Vec<_> = (1..=5)
            .map(|n| address(&format!("2001:db8::{n}")))
            .collect();
        let all = [&v6[..], &[address("192.0.2.1")]].concat();
        let tried = of_both_kinds(all);
        assert_eq!(tried, [v6[0], address("192.0.2.1"), v6[1], v6[2]]);
    }
}
