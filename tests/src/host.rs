//! An outside host: a network namespace with the stand-in model API or another server. A veth
//! pair joins it to this machine. Containers reach it as they reach any server.

use std::{net::IpAddr, process::Command, time::Duration};

use tempfile::TempDir;

use crate::{
    namespace::Namespace,
    process::{Process, succeed},
    program, wait_until,
};
use polydev_stand_in::Received;

/// Dropping the host removes it and its interfaces.
#[derive(Debug)]
pub struct Host {
    namespace: Namespace,
    pub address: IpAddr,
    /// The stand-in's URL: `http://` and an IP address.
    pub url: String,
    server: Option<Process>,
    _folder: TempDir,
}

impl Host {
    /// Starts the stand-in in a namespace.
    ///
    /// # Panics
    /// Without root's rights, or if the stand-in does not answer.
    #[must_use]
    pub fn start() -> Self {
        let host = Self::serve(|address| {
            let mut command = Command::new(program("stand-in"));
            command.arg(format!("{address}:80"));
            command
        });
        wait_until("the stand-in", Duration::from_secs(10), || {
            host.try_requests()
        });
        host
    }

    /// Makes the namespace and starts the command that `server` returns for its address. The
    /// addresses are from 198.18.0.0/15, which is reserved for tests between networks.
    ///
    /// # Panics
    /// Without root's rights.
    #[must_use]
    pub fn serve(server: impl FnOnce(IpAddr) -> Command) -> Self {
        Self::serve_in([198, 18], server)
    }

    /// As [`Host::serve`], in the network with these first two bytes.
    ///
    /// # Panics
    /// Without root's rights.
    #[must_use]
    pub fn serve_in([first, second]: [u8; 2], server: impl FnOnce(IpAddr) -> Command) -> Self {
        let nonce = rand::random::<u16>();
        let namespace = Namespace::new("pdt");
        let [high, low] = (nonce & 0xfffc).to_be_bytes();
        let (here, there) = (
            format!("{first}.{second}.{high}.{}", low + 1),
            format!("{first}.{second}.{high}.{}", low + 2),
        );
        let name = namespace.name();
        let (outer, inner) = (format!("{name}h"), format!("{name}n"));
        let folder = tempfile::tempdir().expect("a folder can be made");
        let mut host = Self {
            namespace,
            address: there.parse().expect("the address is valid"),
            url: format!("http://{there}"),
            server: None,
            _folder: folder,
        };
        let namespace = &host.namespace;
        let name = namespace.name();
        ip(&[
            "link", "add", &outer, "type", "veth", "peer", "name", &inner, "netns", name,
        ]);
        ip(&["addr", "add", &format!("{here}/30"), "dev", &outer]);
        ip(&["link", "set", &outer, "up"]);
        namespace.ip(&["addr", "add", &format!("{there}/30"), "dev", &inner]);
        namespace.ip(&["link", "set", &inner, "up"]);
        namespace.ip(&["route", "add", "default", "via", &here]);

        let server = server(host.address);
        let mut command = namespace.inside();
        command.arg(server.get_program()).args(server.get_args());
        host.server = Some(Process::start(
            &mut command,
            &host._folder.path().join("server.log"),
        ));
        host
    }

    /// This machine finds `address` at the host from now on. A server that listens on all of
    /// the host's addresses answers there.
    ///
    /// # Panics
    /// Without root's rights, or if the machine finds the address elsewhere.
    pub fn answer_at(&self, address: IpAddr) {
        let name = self.namespace.name();
        let (outer, inner) = (format!("{name}h"), format!("{name}n"));
        let one = match address {
            IpAddr::V4(_) => format!("{address}/32"),
            IpAddr::V6(_) => {
                self.join_by_ipv6(&outer, &inner);
                format!("{address}/128")
            }
        };
        self.namespace.ip(&["addr", "add", &one, "dev", &inner]);
        ip(&["route", "add", &one, "dev", &outer]);
    }

    /// Both ends have an address of 2001:db8::/32, which is reserved for documentation.
    fn join_by_ipv6(&self, outer: &str, inner: &str) {
        let end = |last: u8| format!("2001:db8:{:x}::{last}", std::process::id() & 0xffff);
        let [here, there] = [1, 2].map(|last| format!("{}/64", end(last)));
        ip(&["addr", "replace", &here, "dev", outer, "nodad"]);
        let namespace = &self.namespace;
        namespace.ip(&["addr", "replace", &there, "dev", inner, "nodad"]);
        let gateway = end(1);
        namespace.ip(&[
            "-6", "route", "replace", "default", "via", &gateway, "dev", inner,
        ]);
    }

    /// Whether the host gets an answer to a GET within two seconds.
    #[must_use]
    pub fn reaches(&self, url: &str) -> bool {
        let mut command = self.namespace.inside();
        command.args(["curl", "--silent", "--noproxy", "*", "--max-time", "2", url]);
        crate::process::output(&mut command).status.success()
    }

    /// The requests that the stand-in has received so far.
    #[must_use]
    pub fn requests(&self) -> Vec<Received> {
        self.try_requests().expect("the stand-in answers")
    }

    fn try_requests(&self) -> Result<Vec<Received>, String> {
        let mut command = self.namespace.inside();
        received(command.arg("curl"), &self.url)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.server = None;
    }
}

#[track_caller]
fn ip(args: &[&str]) {
    succeed(Command::new("ip").args(args));
}

/// The stand-in on this machine: brokers reach it without TLS, and containers not at all.
#[derive(Debug)]
pub struct Local {
    /// `http://127.0.0.1:PORT`
    pub url: String,
    _server: Process,
    _folder: TempDir,
}

impl Local {
    /// Starts the stand-in.
    ///
    /// # Panics
    /// If it does not answer.
    #[must_use]
    pub fn start() -> Self {
        let [port] = crate::free_ports();
        let address = format!("127.0.0.1:{port}");
        let folder = tempfile::tempdir().expect("a folder can be made");
        let mut command = Command::new(program("stand-in"));
        let log = folder.path().join("server.log");
        let local = Self {
            url: format!("http://{address}"),
            _server: Process::start(command.arg(address), &log),
            _folder: folder,
        };
        wait_until("the stand-in", Duration::from_secs(10), || {
            local.try_requests()
        });
        local
    }

    /// The requests that the stand-in has received so far.
    #[must_use]
    pub fn requests(&self) -> Vec<Received> {
        self.try_requests().expect("the stand-in answers")
    }

    fn try_requests(&self) -> Result<Vec<Received>, String> {
        received(&mut Command::new("curl"), &self.url)
    }
}

/// The requests that the stand-in at `url` has received so far. `curl` is a command that runs
/// curl where the stand-in can be reached.
///
/// # Errors
/// What went wrong.
pub fn received(curl: &mut Command, url: &str) -> Result<Vec<Received>, String> {
    let url = format!("{url}/requests");
    let output = crate::process::output(curl.args(["--silent", "--fail", "--noproxy", "*", &url]));
    serde_json::from_slice(&output.stdout).map_err(|error| format!("{error}: {}", output.status))
}

/// Removes the packet filter's rules of a driver that ended without removing them.
pub fn remove_rules(instance: &str) {
    let rules = |args: &[&str]| crate::process::output(Command::new("iptables").args(args));
    let interface = format!("pd-{instance}");
    for (suffix, from, side) in [
        ("FWD", "FORWARD", "-i"),
        ("TO", "FORWARD", "-o"),
        ("IN", "INPUT", "-i"),
    ] {
        let chain = format!("POLYDEV-{instance}-{suffix}");
        rules(&["-w", "5", "-D", from, side, &interface, "-j", &chain]);
        rules(&["-w", "5", "-F", &chain]);
        rules(&["-w", "5", "-X", &chain]);
    }
}
