//! What the containers of warm slots cannot reach: the host's own services, including Nomad
//! and the node service, and all addresses that are not public, among them the clouds'
//! metadata address. (The bridge already prevents traffic between slots, and has no IPv6.)
//! And nobody beyond this host reaches them.
//!
//! The rules are in three chains of this driver, which it writes as a whole. The first rules of
//! INPUT and FORWARD lead there, so that no rule of another program comes before them. Several
//! drivers of a machine share the first places. [`crate::guard`] looks whether they still do.

use std::{fmt::Write as _, fs, io, process::Stdio, time::Duration};

use ipnet::Ipv4Net;
use polydev_proto::egress::{CLOSED_V4, METADATA_V4};
use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

/// Another program may hold the lock of the tables for a while.
const IPTABLES_TIMEOUT: Duration = Duration::from_secs(10);
/// To print the rules takes no lock.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);

/// Whether what separates containers with a network interface from the node and from its networks
/// is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Guard {
    Open,
    /// Nothing may begin to run in such containers.
    Closed {
        reason: String,
    },
}

/// Why the rules are not active.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot run `{program}`, which blocks access of warm slots to the host's services")]
    Run {
        program: &'static str,
        source: io::Error,
    },
    #[error("`{program}` did not end within {} s", limit.as_secs())]
    TimedOut {
        program: &'static str,
        limit: Duration,
    },
    #[error("`{program}` failed: {words}")]
    Refused {
        program: &'static str,
        words: String,
    },
    #[error("after the rules of the slots' bridge were set, {missing} is missing")]
    NotInForce { missing: String },
    #[error("cannot disable IPv6 on the slots' bridge by `{path}`")]
    Ipv6 { path: String, source: io::Error },
}

/// This driver's rules as `iptables-save` prints them, with its jumps if nobody comes before them.
#[derive(Debug, PartialEq, Eq)]
pub struct Rules(Vec<String>);

/// The firewall rules of one bridge.
#[derive(Debug, Clone)]
pub struct Firewall {
    interface: String,
    /// Chain for traffic to this host.
    input: String,
    /// Chain for traffic from the bridge through this host.
    forward: String,
    /// Chain for traffic from elsewhere to the bridge.
    inward: String,
    /// Name servers that containers use, on this host or elsewhere.
    servers: Vec<String>,
    /// Networks that are not public, and may be reached.
    open: Vec<Ipv4Net>,
}

impl Firewall {
    /// `resolv_conf` is the content of the containers' file. They may reach the networks in
    /// `open` although they are not public.
    #[must_use]
    pub fn new(instance: &str, interface: &str, resolv_conf: &str, open: &[Ipv4Net]) -> Self {
        Self {
            interface: interface.to_owned(),
            input: format!("POLYDEV-{instance}-IN"),
            forward: format!("POLYDEV-{instance}-FWD"),
            inward: format!("POLYDEV-{instance}-TO"),
            servers: servers(resolv_conf),
            open: open.to_vec(),
        }
    }

    /// From the next [`Firewall::set`] on, containers reach the name servers of this file.
    pub fn follow(&mut self, resolv_conf: &str) {
        self.servers = servers(resolv_conf);
    }

    /// Sets the rules, and returns how they are printed from now on.
    ///
    /// # Errors
    /// [`Error`]; slots must not run then.
    pub async fn set(&self) -> Result<Rules, Error> {
        let saved = save(IPTABLES_TIMEOUT).await?;
        let mut rules = self.rules();
        for (from, side, to) in self.jumps() {
            let jump = self.jump(from, side, to);
            if leads(&saved, from, &jump) {
                continue;
            }
            // In one step: there is no moment without it.
            let earlier = of_chain(&saved, from).filter(|rule| *rule == jump).count();
            let words = jump.trim_start_matches("-A ").trim_start_matches(from);
            rules += &format!("-D {from}{words}\n").repeat(earlier);
            rules += &format!("-I {from} 1{words}\n");
        }
        restore(&(rules + "COMMIT\n")).await?;
        self.close_ipv6()?;
        let rules = self.printed(IPTABLES_TIMEOUT).await?;
        match self.missing(&rules) {
            Some(missing) => Err(Error::NotInForce { missing }),
            None => Ok(rules),
        }
    }

    /// The rules as they are now.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn look(&self) -> Result<Rules, Error> {
        self.printed(LOOK_TIMEOUT).await
    }

    async fn printed(&self, limit: Duration) -> Result<Rules, Error> {
        let saved = save(limit).await?;
        let mut own = Vec::new();
        for (from, side, to) in self.jumps() {
            let jump = self.jump(from, side, to);
            own.extend(leads(&saved, from, &jump).then_some(jump));
            own.extend(of_chain(&saved, to).map(str::to_owned));
        }
        own.extend(self.ipv6()?.map(|off| format!("disable_ipv6 {off}")));
        Ok(Rules(own))
    }

    /// What of the rules is not there.
    fn missing(&self, Rules(own): &Rules) -> Option<String> {
        let jumps = self
            .jumps()
            .map(|(from, side, to)| self.jump(from, side, to));
        let wanted = self.rules();
        let count = |rules: &mut dyn Iterator<Item = &str>, chain: &str| {
            let begin = format!("-A {chain} ");
            rules.filter(|rule| rule.starts_with(&begin)).count()
        };
        let is_short = |chain: &&String| {
            let wanted = count(&mut wanted.lines(), chain);
            count(&mut own.iter().map(String::as_str), chain) != wanted
        };
        let chain = self.own().into_iter().find(is_short);
        let jump = jumps.into_iter().find(|jump| !own.contains(jump));
        let ipv6 = own.iter().find(|line| *line == "disable_ipv6 0");
        jump.or(chain.map(|chain| format!("a rule of {chain}")))
            .or(ipv6.map(|_| "`disable_ipv6`".into()))
    }

    /// The chains of this driver.
    fn own(&self) -> [&String; 3] {
        [&self.input, &self.forward, &self.inward]
    }

    /// From which chain, for packets in or out of the bridge, to which of ours.
    fn jumps(&self) -> [(&'static str, &'static str, &str); 3] {
        [
            ("FORWARD", "-i", &self.forward),
            ("FORWARD", "-o", &self.inward),
            ("INPUT", "-i", &self.input),
        ]
    }

    fn jump(&self, from: &str, side: &str, to: &str) -> String {
        format!("-A {from} {side} {} -j {to}", self.interface)
    }

    /// Removes the rules; missing rules are not an error.
    pub async fn remove(&self) {
        // An earlier driver had its jump in Docker's chain.
        let earlier = ("DOCKER-USER", "-i", &*self.forward);
        for (from, side, to) in self.jumps().into_iter().chain([earlier]) {
            let _was_not_there = iptables(&["-D", from, side, &self.interface, "-j", to]).await;
        }
        // In one step: a driver that is told to end has little time. Naming a chain empties it.
        let chains = self.chains();
        let removals = self.own().map(|chain| format!("-X {chain}\n"));
        let rules = format!("{chains}{}COMMIT\n", removals.concat());
        if let Err(error) = restore(&rules).await {
            tracing::info!(error = crate::chain(&error), "the bridge's rules stay");
        }
    }

    /// `1` if the bridge has no IPv6. `None` if there is no bridge, or the kernel has no IPv6.
    fn ipv6(&self) -> Result<Option<String>, Error> {
        let path = self.ipv6_path();
        match fs::read_to_string(&path) {
            Ok(off) => Ok(Some(off.trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::Ipv6 { path, source }),
        }
    }

    /// No rule is for IPv6: the host takes and passes on nothing from a bridge without it. Between
    /// containers, their ports are isolated.
    fn close_ipv6(&self) -> Result<(), Error> {
        let path = self.ipv6_path();
        match self.ipv6()?.as_deref() {
            None | Some("1") => Ok(()),
            Some(_) => fs::write(&path, "1").map_err(|source| Error::Ipv6 { path, source }),
        }
    }

    fn ipv6_path(&self) -> String {
        format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", self.interface)
    }

    /// In the format of `iptables-restore`: naming a chain empties it.
    fn chains(&self) -> String {
        let chains = self.own().map(|chain| format!(":{chain} - [0:0]\n"));
        format!("*filter\n{}", chains.concat())
    }

    /// All chains, in the format of `iptables-restore`, without its end.
    fn rules(&self) -> String {
        let Self {
            input,
            forward,
            inward,
            servers,
            open,
            ..
        } = self;
        let mut rules = self.chains();
        for chain in [input, forward] {
            for server in servers {
                for protocol in ["udp", "tcp"] {
                    let _infallible = writeln!(
                        rules,
                        "-A {chain} -d {server}/32 -p {protocol} --dport 53 -j RETURN"
                    );
                }
            }
        }
        // Nobody connects to a slot, whatever Docker's rules are.
        for chain in [input, inward] {
            rules += &format!(
                "-A {chain} -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN\n\
                 -A {chain} -j DROP\n"
            );
        }
        // A program should hear at once that there is no way, and not wait for an answer.
        // A network around such an address does not open it.
        let is_named = |address: &&str| open.iter().any(|open| open.to_string() == **address);
        for address in METADATA_V4.iter().filter(|address| !is_named(address)) {
            let _infallible = writeln!(rules, "-A {forward} -d {address} -j REJECT");
        }
        for network in open {
            let _infallible = writeln!(rules, "-A {forward} -d {network} -j RETURN");
        }
        for network in CLOSED_V4 {
            let _infallible = writeln!(rules, "-A {forward} -d {network} -j REJECT");
        }
        rules
    }
}

/// The name servers of a resolv.conf.
fn servers(resolv_conf: &str) -> Vec<String> {
    let servers = resolv_conf.lines().filter_map(|line| {
        let server = line.strip_prefix("nameserver")?.trim();
        let is_v4 = server.parse::<std::net::Ipv4Addr>().is_ok();
        is_v4.then(|| server.to_owned())
    });
    servers.collect()
}

/// The rules of a chain, as `iptables-save` prints them.
fn of_chain<'a>(saved: &'a str, chain: &str) -> impl Iterator<Item = &'a str> + use<'a> {
    let begin = format!("-A {chain} ");
    saved.lines().filter(move |line| line.starts_with(&begin))
}

/// Whether a driver's jump comes before all rules but the jumps of other drivers, which are for
/// their own bridges.
fn leads(saved: &str, from: &str, jump: &str) -> bool {
    let begins = ["-i", "-o"].map(|side| format!("-A {from} {side} pd-"));
    let is_drivers = |rule: &&str| {
        let is_for_bridge = begins.iter().any(|begin| rule.starts_with(begin));
        is_for_bridge && rule.contains(" -j POLYDEV-")
    };
    let mut first = of_chain(saved, from).take_while(is_drivers);
    first.any(|rule| rule == jump)
}

/// Adds to what is there, all of it or nothing.
async fn restore(rules: &str) -> Result<(), Error> {
    let arguments = ["--noflush", "-w", "5"];
    run("iptables-restore", &arguments, rules, IPTABLES_TIMEOUT)
        .await
        .map(drop)
}

async fn iptables(arguments: &[&str]) -> Result<(), Error> {
    let arguments = [&["-w", "5"], arguments].concat();
    run("iptables", &arguments, "", IPTABLES_TIMEOUT)
        .await
        .map(drop)
}

async fn save(limit: Duration) -> Result<String, Error> {
    run("iptables-save", &["-t", "filter"], "", limit).await
}

/// Returns what the program prints.
async fn run(
    program: &'static str,
    arguments: &[&str],
    input: &str,
    limit: Duration,
) -> Result<String, Error> {
    let failed = |source| Error::Run { program, source };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let done = async {
        if let Some(mut stdin) = child.stdin.take() {
            // A program that ends early reports the reason itself.
            let _closed = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = timeout(limit, done).await;
    let output = output
        .map_err(|_| Error::TimedOut { program, limit })?
        .map_err(failed)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(Error::Refused {
            program,
            words: text(&output.stderr),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_resolve_and_nothing_else_of_the_host_answers() {
        let firewall = Firewall::new(
            "0123abcd",
            "pd-0123abcd",
            "nameserver 10.0.0.2\nnameserver fd00::1\n",
            &["10.1.0.0/16".parse().unwrap()],
        );
        let expected = "*filter\n:POLYDEV-0123abcd-IN - [0:0]\n:POLYDEV-0123abcd-FWD - [0:0]\n\
            :POLYDEV-0123abcd-TO - [0:0]\n\
            -A POLYDEV-0123abcd-IN -d 10.0.0.2/32 -p udp --dport 53 -j RETURN\n\
            -A POLYDEV-0123abcd-IN -d 10.0.0.2/32 -p tcp --dport 53 -j RETURN\n\
            -A POLYDEV-0123abcd-FWD -d 10.0.0.2/32 -p udp --dport 53 -j RETURN\n\
            -A POLYDEV-0123abcd-FWD -d 10.0.0.2/32 -p tcp --dport 53 -j RETURN\n\
            -A POLYDEV-0123abcd-IN -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN\n\
            -A POLYDEV-0123abcd-IN -j DROP\n\
            -A POLYDEV-0123abcd-TO -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN\n\
            -A POLYDEV-0123abcd-TO -j DROP\n\
            -A POLYDEV-0123abcd-FWD -d 100.100.100.200/32 -j REJECT\n\
            -A POLYDEV-0123abcd-FWD -d 168.63.129.16/32 -j REJECT\n\
            -A POLYDEV-0123abcd-FWD -d 169.254.169.254/32 -j REJECT\n\
            -A POLYDEV-0123abcd-FWD -d 169.254.170.2/32 -j REJECT\n\
            -A POLYDEV-0123abcd-FWD -d 10.1.0.0/16 -j RETURN\n\
            -A POLYDEV-0123abcd-FWD -d 0.0.0.0/8 -j REJECT\n";
        let rules = firewall.rules();
        assert!(rules.starts_with(expected), "{rules}");
        for closed in ["10.0.0.0/8", "169.254.0.0/16", "192.168.0.0/16"] {
            let rule = format!("-A POLYDEV-0123abcd-FWD -d {closed} -j REJECT\n");
            assert!(rules.contains(&rule), "{rules}");
        }
        // A chain's name has at most 28 letters.
        assert!(firewall.forward.len() <= 28 && firewall.input.len() <= 28);
    }

    const SAVED: &str = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n\
        -A INPUT -i pd-0123abcd -j POLYDEV-0123abcd-IN\n\
        -A FORWARD -j DOCKER-USER\n\
        -A FORWARD -i pd-0123abcd -j POLYDEV-0123abcd-FWD\n\
        -A FORWARD -i pd-0123abcd0 -j POLYDEV-0123abcd0-FWD\n\
        -A POLYDEV-0123abcd-IN -j DROP\nCOMMIT\n";

    #[test]
    fn a_jump_leads_if_only_jumps_of_drivers_come_before_it() {
        let input = "-A INPUT -i pd-0123abcd -j POLYDEV-0123abcd-IN";
        let forward = "-A FORWARD -i pd-0123abcd -j POLYDEV-0123abcd-FWD";
        assert!(leads(SAVED, "INPUT", input));
        assert!(
            !leads(SAVED, "FORWARD", forward),
            "Docker's comes before it"
        );
        let others = SAVED.replace(
            "-A FORWARD -j DOCKER-USER",
            "-A FORWARD -i pd-1 -j POLYDEV-1-FWD\n-A FORWARD -o pd-1 -j POLYDEV-1-TO",
        );
        assert!(leads(&others, "FORWARD", forward));
        assert_eq!(of_chain(SAVED, "POLYDEV-0123abcd-IN").count(), 1);
    }

    #[test]
    fn rules_that_lack_anything_are_not_in_force() {
        let firewall = Firewall::new("0123abcd", "pd-0123abcd", "", &[]);
        let whole: Vec<String> = (firewall.jumps())
            .map(|(from, side, to)| firewall.jump(from, side, to))
            .into_iter()
            .chain(firewall.rules().lines().map(str::to_owned))
            .filter(|line| line.starts_with("-A "))
            .collect();
        assert_eq!(firewall.missing(&Rules(whole.clone())), None);
        for gone in 0..whole.len() {
            let mut rules = whole.clone();
            rules.remove(gone);
            assert!(firewall.missing(&Rules(rules)).is_some(), "{}", whole[gone]);
        }
    }
}
