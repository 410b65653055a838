//! What keeps slots from the node and from each other holds, or there are no slots.

mod attack;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::Command,
    time::{Duration, Instant},
};

use polydev_proto::runtime::{
    GetPoolRequest, RunStart, SlotState, run_event::Event, run_input::Input,
};
use polydev_tests::{
    client::{Client, Run, shell},
    folder::Folder,
    host::Host,
    process::{output, succeed},
    shim::Shim,
    wait_until,
};

/// Nothing may begin this long after the rules are gone.
const CLOSED: Duration = Duration::from_secs(1);
const BACK: Duration = Duration::from_secs(10);

fn iptables(words: &str) -> String {
    succeed(
        Command::new("iptables")
            .args(["-w", "5"])
            .args(words.split(' ')),
    )
}

/// A run that tries to connect for each line of its stdin, and prints `yes` or `no`.
fn asks(client: &Client, target: &str) -> Run {
    let script = format!(
        "while read line; do if curl --silent --noproxy '*' --connect-timeout 1 --max-time 2 \
         --output /dev/null {target}; then echo yes; else echo no; fi; done"
    );
    let start = RunStart {
        stdin: true,
        ..shell("anthropic", &script)
    };
    client.start(start).expect("it begins")
}

fn reaches(client: &Client, run: &mut Run) -> bool {
    client.send(run, Input::Stdin("\n".into()));
    loop {
        match client.next(run).expect("the run goes on") {
            Some(Event::Stdout(output)) => break output.data.starts_with(b"yes"),
            Some(_) => {}
            None => panic!("the run ended"),
        }
    }
}

/// A packet may be lost while a run's bucket is set, or while nobody knows an address.
#[track_caller]
fn wait_reaches(client: &Client, run: &mut Run) {
    wait_until("an answer", BACK, || match reaches(client, run) {
        true => Ok(()),
        false => Err("nothing".into()),
    });
}

/// The state of the pool's idle or held slot, and why.
fn waiting(client: &Client) -> (SlotState, String) {
    let request = GetPoolRequest {
        provider: "anthropic".into(),
    };
    let pool = client.call(async |mut shim| shim.get_pool(request).await);
    let mut slots = pool.expect("it answers").slots.into_iter();
    let slot = slots.find(|slot| slot.state() != SlotState::Claimed);
    slot.map_or((SlotState::Unspecified, String::new()), |slot| {
        (slot.state(), slot.reason)
    })
}

#[test]
fn without_its_rules_a_node_has_no_idle_slot_and_its_runs_no_network() {
    let folder = Folder::new("pdtest-");
    let (program, fails) = (
        folder.path().join("iptables-restore"),
        folder.path().join("fails"),
    );
    let script = format!(
        "#!/bin/sh\nif [ -e '{}' ]; then echo 'no rules today' >&2; exit 1; fi\n\
         exec /usr/sbin/iptables-restore \"$@\"\n",
        fails.display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}", folder.path().display());
    let outside = Host::start();
    let shim = Shim::dev_in(&["anthropic=2"], &[], &[("PATH", &path)]);
    let client = shim.client();
    let instance = shim.label().replace("dev.polydev.instance=", "");
    let chain = format!("POLYDEV-{instance}-FWD");
    let mut run = asks(&client, &format!("{}/requests", outside.url));
    wait_reaches(&client, &mut run);
    assert_eq!(waiting(&client).0, SlotState::Idle);

    // As a reload of a firewall does, whose program does not work today.
    fs::write(&fails, "").unwrap();
    iptables(&format!("-F {chain}"));
    let flushed = Instant::now();
    wait_until("no idle slot", CLOSED, || match waiting(&client) {
        (SlotState::Idle, reason) => Err(reason),
        _ => Ok(()),
    });
    assert!(flushed.elapsed() < CLOSED);
    let (state, reason) = waiting(&client);
    assert_eq!(state, SlotState::Warming);
    assert!(reason.contains("no rules today"), "{reason}");
    let refused = RunStart {
        queue_timeout: Some(prost_types::Duration::default()),
        ..shell("anthropic", "true")
    };
    assert!(client.run(refused).is_err());
    assert!(!reaches(&client, &mut run), "it runs without rules");

    fs::remove_file(&fails).unwrap();
    wait_until("an idle slot", BACK, || match waiting(&client) {
        (SlotState::Idle, _) => Ok(()),
        (state, reason) => Err(format!("{state:?}: {reason}")),
    });
    wait_reaches(&client, &mut run);
    assert!(iptables(&format!("-S {chain}")).contains("169.254.0.0/16"));

    // The jump alone is lost, or another rule comes before it.
    let jump = format!("FORWARD -i pd-{instance} -j {chain}");
    let is_first = || {
        let rules = iptables("-S FORWARD");
        let mut all = rules.lines().filter(|line| line.starts_with("-A "));
        // Those of other drivers on this machine are for their own bridges.
        let mut drivers = all.by_ref().take_while(|line| line.contains("-j POLYDEV-"));
        let leads = drivers.any(|line| line == format!("-A {jump}"));
        leads.then_some(()).ok_or(rules)
    };
    wait_until("the jump", BACK, is_first);
    iptables(&format!("-D {jump}"));
    wait_until("another jump", BACK, is_first);
    client.wait_idle("anthropic", 1);
    wait_reaches(&client, &mut run);
}

#[test]
fn slots_do_not_reach_each_other_whatever_the_rules_are() {
    let shim = Shim::dev(&["anthropic=2"]);
    let client = shim.client();
    client.wait_idle("anthropic", 2);
    let (_server, address) = serves(&client);
    let mut run = asks(&client, &format!("http://{address}:9000/"));
    assert!(!reaches(&client, &mut run));
    // A bridge need not ask the rules about what it passes on.
    let _asks_nobody = Unfiltered::set();
    assert!(!reaches(&client, &mut run));
    // It would be heard if its port were as others are.
    let interface = shim.label().replace("dev.polydev.instance=", "pd-");
    for port in ports(&interface) {
        succeed(Command::new("bridge").args(["link", "set", "dev", &port, "isolated", "off"]));
    }
    wait_reaches(&client, &mut run);
}

/// A run that answers at port 9000, and its address.
fn serves(client: &Client) -> (Run, String) {
    let script = "node -e \"require('http').createServer((q, a) => a.end('hello')).listen(9000, \
                  () => console.log(require('os').networkInterfaces().eth0[0].address))\"";
    let mut server = client.start(shell("anthropic", script)).expect("it begins");
    loop {
        if let Some(Event::Stdout(output)) = client.next(&mut server).expect("it goes on") {
            let address = String::from_utf8_lossy(&output.data).trim().to_owned();
            break (server, address);
        }
    }
}

/// As if Docker had no rules (`"iptables": false`), or another program opened the bridge.
#[test]
fn nobody_connects_to_a_slot_from_elsewhere_whatever_the_rules_are() {
    let outside = Host::start();
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let (_server, address) = serves(&client);
    let url = format!("http://{address}:9000/");
    let instance = shim.label().replace("dev.polydev.instance=", "");
    let opened = Opened::set(format!("FORWARD -o pd-{instance} -j ACCEPT"));
    let jump = format!("-A FORWARD -o pd-{instance} -j POLYDEV-{instance}-TO");
    wait_until("the driver's rules before it", BACK, || {
        let rules = iptables("-S FORWARD");
        let at = |rule: &str| rules.lines().position(|line| line == rule);
        let is_before = at(&jump) < at(&format!("-A {}", opened.0));
        (is_before && at(&jump).is_some())
            .then_some(())
            .ok_or(rules)
    });
    // This machine itself is not kept out.
    succeed(Command::new("curl").args(["--silent", "--noproxy", "*", "--max-time", "5", &url]));
    assert!(!outside.reaches(&url), "it answers to another machine");
}

/// A rule, before all others, while this exists.
struct Opened(String);

impl Opened {
    fn set(rule: String) -> Self {
        iptables(&format!("-I {rule}"));
        Self(rule)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let words = format!("-w 5 -D {}", self.0);
        output(Command::new("iptables").args(words.split(' ')));
    }
}

/// Bridges pass on what they like while this exists.
struct Unfiltered(String);

const FILTERED: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";

impl Unfiltered {
    fn set() -> Self {
        let before = fs::read_to_string(FILTERED).expect("bridges can be filtered");
        fs::write(FILTERED, "0").expect("root may set it");
        Self(before)
    }
}

impl Drop for Unfiltered {
    fn drop(&mut self) {
        fs::write(FILTERED, &self.0).expect("root may set it");
    }
}

fn ports(interface: &str) -> Vec<String> {
    let listed = output(Command::new("ip").args(["-brief", "link", "show", "master", interface]));
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let names = listed
        .lines()
        .filter_map(|line| line.split(['@', ' ']).next());
    names.map(str::to_owned).collect()
}

#[test]
fn containers_that_run_see_the_nodes_new_name_servers() {
    let folder = Folder::new("pdtest-");
    let servers = folder.path().join("resolv.conf");
    fs::write(&servers, "nameserver 192.0.2.1\n").unwrap();
    // A file of its own, for this driver alone.
    let mut command = Command::new("unshare");
    let script = "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";
    command.args(["--mount", "sh", "-c", script]).arg(&servers);
    let shim = Shim::dev_within(command, &["anthropic=2"]);
    let client = shim.client();
    let script = "while read line; do cat /etc/resolv.conf; done";
    let start = RunStart {
        stdin: true,
        ..shell("anthropic", script)
    };
    let mut run = client.start(start).expect("it begins");
    let mut reads = || {
        client.send(&run, Input::Stdin("\n".into()));
        loop {
            if let Some(Event::Stdout(output)) = client.next(&mut run).expect("it goes on") {
                break String::from_utf8_lossy(&output.data).into_owned();
            }
        }
    };
    assert!(reads().contains("192.0.2.1"));
    fs::write(&servers, "nameserver 192.0.2.77\n").unwrap();
    wait_until("the new name server", Duration::from_secs(5), || {
        let read = reads();
        read.contains("192.0.2.77").then_some(()).ok_or(read)
    });
    let instance = shim.label().replace("dev.polydev.instance=", "");
    assert!(iptables(&format!("-S POLYDEV-{instance}-FWD")).contains("192.0.2.77/32"));
    // An idle container is not made again for this.
    client.wait_idle("anthropic", 1);
    let next = client
        .run(shell("anthropic", "cat /etc/resolv.conf"))
        .unwrap();
    assert!(next.stdout().contains("192.0.2.77"), "{}", next.stdout());
}

#[test]
fn the_slots_bridge_has_no_ipv6() {
    let shim = Shim::dev(&["anthropic=1"]);
    let interface = shim.label().replace("dev.polydev.instance=", "pd-");
    let ipv6 = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"));
    assert_eq!(ipv6.unwrap().trim(), "1");
}
