//! What the containers of warm slots cannot reach: the host's own services, including Nomad
//! and the node service, and all addresses that are not public, among them the clouds'
//! metadata address. (The bridge already prevents traffic between slots, and has no IPv6.)
//!
//! The rules are in two chains of this driver, which it writes as a whole. Jumps lead to
//! the chains from INPUT and from Docker's chain for user rules.

use std::{fmt::Write as _, io, process::Stdio, time::Duration};

use ipnet::Ipv4Net;
use polydev_proto::egress::CLOSED_V4;
use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

/// Another program may hold the lock of the tables for a while.
const IPTABLES_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the rules are not active.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot run `{program}`, which blocks access of warm slots to the host's services")]
    Run {
        program: &'static str,
        source: io::Error,
    },
    #[error("`{program}` did not end within {} s", IPTABLES_TIMEOUT.as_secs())]
    TimedOut { program: &'static str },
    #[error("`{program}` failed: {words}")]
    Refused {
        program: &'static str,
        words: String,
    },
}

/// The firewall rules of one bridge.
#[derive(Debug, Clone)]
pub struct Firewall {
    interface: String,
    /// Chain for traffic to this host.
    input: String,
    /// Chain for traffic through this host.
    forward: String,
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
        let servers = resolv_conf.lines().filter_map(|line| {
            let server = line.strip_prefix("nameserver")?.trim();
            server
                .parse::<std::net::Ipv4Addr>()
                .ok()
                .map(|_| server.to_owned())
        });
        Self {
            interface: interface.to_owned(),
            input: format!("POLYDEV-{instance}-IN"),
            forward: format!("POLYDEV-{instance}-FWD"),
            servers: servers.collect(),
            open: open.to_vec(),
        }
    }

    /// Activates the rules unless they are already active.
    ///
    /// # Errors
    /// [`Error`]; slots must not run then.
    pub async fn ensure(&self) -> Result<(), Error> {
        restore(&self.rules()).await?;
        let docker = iptables(&["-n", "-L", "DOCKER-USER"]).await.is_ok();
        let forward = if docker { "DOCKER-USER" } else { "FORWARD" };
        for (from, to) in [(forward, &self.forward), ("INPUT", &self.input)] {
            let jump = ["-i", &*self.interface, "-j", to];
            if iptables(&[&["-C", from], &jump[..]].concat())
                .await
                .is_err()
            {
                iptables(&[&["-I", from], &jump[..]].concat()).await?;
            }
        }
        Ok(())
    }

    /// Removes the rules; missing rules are not an error.
    pub async fn remove(&self) {
        for (from, to) in [
            ("DOCKER-USER", &self.forward),
            ("FORWARD", &self.forward),
            ("INPUT", &self.input),
        ] {
            let _was_not_there = iptables(&["-D", from, "-i", &self.interface, "-j", to]).await;
        }
        // In one step: a driver that is told to end has little time. Naming a chain empties it.
        let Self { input, forward, .. } = self;
        let rules = format!(
            "*filter\n:{input} - [0:0]\n:{forward} - [0:0]\n-X {input}\n-X {forward}\nCOMMIT\n"
        );
        if let Err(error) = restore(&rules).await {
            tracing::info!(error = crate::chain(&error), "the bridge's rules stay");
        }
    }

    /// Both chains, in the format of `iptables-restore`: naming a chain empties it.
    fn rules(&self) -> String {
        let Self {
            input,
            forward,
            servers,
            open,
            ..
        } = self;
        let mut rules = format!("*filter\n:{input} - [0:0]\n:{forward} - [0:0]\n");
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
        rules += &format!(
            "-A {input} -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN\n\
             -A {input} -j DROP\n"
        );
        for network in open {
            let _infallible = writeln!(rules, "-A {forward} -d {network} -j RETURN");
        }
        // A program should hear at once that there is no way, and not wait for an answer.
        for network in CLOSED_V4 {
            let _infallible = writeln!(rules, "-A {forward} -d {network} -j REJECT");
        }
        rules + "COMMIT\n"
    }
}

/// Adds to what is there, all of it or nothing.
async fn restore(rules: &str) -> Result<(), Error> {
    let program = Command::new("iptables-restore");
    run(
        "iptables-restore",
        program,
        &["--noflush", "-w", "5"],
        rules,
    )
    .await
}

async fn iptables(arguments: &[&str]) -> Result<(), Error> {
    let arguments = [&["-w", "5"], arguments].concat();
    run("iptables", Command::new("iptables"), &arguments, "").await
}

async fn run(
    program: &'static str,
    mut command: Command,
    arguments: &[&str],
    input: &str,
) -> Result<(), Error> {
    let failed = |source| Error::Run { program, source };
    let mut child = command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
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
    let output = timeout(IPTABLES_TIMEOUT, done).await;
    let output = output
        .map_err(|_| Error::TimedOut { program })?
        .map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Refused {
        program,
        words: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
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
            -A POLYDEV-0123abcd-IN -d 10.0.0.2/32 -p udp --dport 53 -j RETURN\n\
            -A POLYDEV-0123abcd-IN -d 10.0.0.2/32 -p tcp --dport 53 -j RETURN\n\
            -A POLYDEV-0123abcd-FWD -d 10.0.0.2/32 -p udp --dport 53 -j RETURN\n\
            -A POLYDEV-0123abcd-FWD -d 10.0.0.2/32 -p tcp --dport 53 -j RETURN\n\
            -A POLYDEV-0123abcd-IN -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN\n\
            -A POLYDEV-0123abcd-IN -j DROP\n\
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
}
