//! A command tries everything that the docs call closed: from a warm slot with a network, from
//! one whose way out is the broker, and from a plain task behind the broker.

use std::{
    collections::BTreeMap,
    net::{IpAddr, TcpListener},
    path::Path,
    process::Command,
    time::Duration,
};

use polydev_tests::{
    client::shell,
    docker,
    host::Host,
    job::{self, batch, merge},
    nomad::Nomad,
    process::{output, succeed},
    program,
    shim::Shim,
    wait_until,
};
use serde_json::json;

/// The runtime image, which has curl and node, by its id: the tag `latest` would be pulled.
fn image() -> String {
    let image = "polydev-anthropic-runtime:latest";
    let id = docker::docker(&["image", "inspect", "--format", "{{ .Id }}", image]);
    id.trim().to_owned()
}

/// What the broker allows: every address that is not closed.
const ALL: &str = "*,0.0.0.0/0,::/0";

/// One address of each closed class that can be at another machine, and each known metadata
/// address (docs/egress.md).
fn closed() -> Vec<IpAddr> {
    let low = rand::random::<u8>();
    [
        format!("10.211.{low}.9"),
        format!("100.65.{low}.9"),
        format!("169.254.{low}.9"),
        format!("172.16.{low}.9"),
        "192.0.0.77".into(),
        format!("192.168.{low}.9"),
        format!("240.1.{low}.9"),
        "100.100.100.200".into(),
        "168.63.129.16".into(),
        "169.254.169.254".into(),
        "169.254.170.2".into(),
        "fd00:ec2::254".into(),
        format!("fd12:3456:{low:x}::9"),
        format!("fec0::{low:x}:9"),
        format!("2002:a00:{low:x}::9"),
        format!("2001:0:{low:x}::9"),
        format!("64:ff9b:1:{low:x}::9"),
    ]
    .map(|address| address.parse().expect("it is an address"))
    .into()
}

/// Those that lead nowhere, or to the container itself, or are one of the others in another form.
const NOWHERE: [&str; 6] = [
    "0.0.0.1",
    "127.0.0.1:81",
    "224.0.0.1",
    "255.255.255.255",
    "[::1]:81",
    "[::ffff:10.211.0.9]",
];

/// Every address of this machine. Its services listen behind them.
fn own_addresses() -> Vec<IpAddr> {
    let listed = succeed(Command::new("ip").args(["-json", "addr", "show", "up"]));
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("it is JSON");
    let interfaces = listed.as_array().into_iter().flatten();
    let of_all = interfaces.flat_map(|interface| interface["addr_info"].as_array().cloned());
    let addresses = of_all.flatten().filter_map(|info| {
        // Others need the name of an interface.
        (info["scope"] == "global").then(|| info["local"].as_str()?.parse().ok())?
    });
    addresses.collect()
}

fn url(address: &IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(*address, port).to_string()
}

/// The server that is at every closed address, and a service of this machine.
struct Targets {
    host: Host,
    service: TcpListener,
    closed: Vec<IpAddr>,
}

impl Targets {
    /// This machine itself reaches them all, so whoever does not is kept from them.
    fn new() -> Self {
        let host = Host::serve(|_| {
            let mut command = Command::new(program("stand-in"));
            command.arg("[::]:80");
            command
        });
        let closed = closed();
        closed.iter().for_each(|address| host.answer_at(*address));
        let service = TcpListener::bind("[::]:0").expect("a port is free");
        for address in closed.iter().chain([&host.address]) {
            let target = format!("http://{}/requests", url(address, 80));
            wait_until("its answer", Duration::from_secs(10), || {
                let mut curl = Command::new("curl");
                curl.args(["--silent", "--fail", "--noproxy", "*", "--max-time", "2"]);
                let answer = output(curl.arg(&target));
                answer.status.success().then_some(()).ok_or(target.clone())
            });
        }
        Self {
            host,
            service,
            closed,
        }
    }

    /// What a command is to try, without `http://`.
    fn all(&self) -> Vec<String> {
        let port = self.service.local_addr().expect("it is bound").port();
        let closed = self.closed.iter().map(|address| url(address, 80));
        let own = own_addresses();
        let own = own.iter().map(|address| url(address, port));
        let nowhere = NOWHERE.map(str::to_owned);
        closed.chain(own).chain(nowhere).collect()
    }
}

/// A script that prints each target with the status of its answer, or 000 and why there is none.
fn tries(targets: &[String]) -> String {
    let list = targets.join(" ");
    format!(
        "for target in {list}; do \
         (curl --silent --output /dev/null --connect-timeout 2 --max-time 4 \
          --write-out \"$target %{{http_code}}\\n\" \"http://$target/requests\") & done; wait"
    )
}

/// The status of each target.
fn statuses(told: &str) -> BTreeMap<String, String> {
    let pair = |line: &str| {
        let (target, status) = line.split_once(' ').expect("a target and a status");
        (target.to_owned(), status.to_owned())
    };
    told.lines().map(pair).collect()
}

/// `reached` is the public address, which shows that the way out works.
#[track_caller]
fn only_reaches(told: &str, reached: &str, targets: &[String], refused: &str) {
    let mut statuses = statuses(told);
    assert_eq!(statuses.remove(reached).as_deref(), Some("200"), "{told}");
    assert_eq!(statuses.len(), targets.len(), "{told}");
    statuses.retain(|_, status| status != refused);
    assert_eq!(statuses, BTreeMap::new(), "it reaches what is closed");
}

#[test]
fn no_closed_address_is_reached_from_a_slot_with_a_network() {
    let targets = Targets::new();
    let shim = Shim::dev(&["anthropic=1"]);
    let all = targets.all();
    let reached = url(&targets.host.address, 80);
    let script = tries(&[&all[..], std::slice::from_ref(&reached)].concat());
    let outcome = shim.client().run(shell("anthropic", &script)).unwrap();
    only_reaches(&outcome.stdout(), &reached, &all, "000");
}

#[test]
fn no_closed_address_is_reached_through_the_broker() {
    let targets = Targets::new();
    let egress = format!("--egress=anthropic={ALL}");
    let shim = Shim::dev_with(&["anthropic=1"], &[&egress]);
    let nomad = Nomad::start();
    let reached = url(&targets.host.address, 80);
    // The container's own loopback does not pass the broker.
    let mut all = targets.all();
    all.retain(|target| !target.starts_with("127.") && !target.starts_with("[::1]"));
    let script = tries(&[&all[..], std::slice::from_ref(&reached)].concat());
    let outcome = shim.client().run(shell("anthropic", &script)).unwrap();
    only_reaches(&outcome.stdout(), &reached, &all, "403");

    // Nomad takes it for a template.
    let mut config = job::shell(&script.replace("%{", "%%{"));
    let allow: Vec<&str> = ALL.split(',').collect();
    merge(
        &mut config,
        json!({ "image": image(), "egress": [{ "allow": allow }] }),
    );
    nomad.submit(&batch("attack", config));
    let alloc = nomad.wait_dead("attack");
    let told = nomad.logs(job::id(&alloc), "stdout");
    only_reaches(&String::from_utf8_lossy(&told), &reached, &all, "403");
}

/// Prints a line for each thing that a command must not be able to do.
fn grabs(state_dir: &Path) -> String {
    let state = state_dir.display();
    format!(
        r#"
        for path in /run/docker.sock /var/run/docker.sock /run/containerd/containerd.sock \
            {state} {state}/node.sock /var/lib/docker /proc/1/root/etc /proc/1/cwd/etc; do
            ls "$path" >/dev/null 2>&1 && echo "there: $path"
        done
        for path in /proc/1/environ /proc/1/mem /proc/1/maps /proc/kcore /proc/kmsg /dev/mem \
            /dev/kmsg /dev/sda /dev/vda /etc/shadow /proc/1/fd/0; do
            [ -n "$(head -c 1 "$path" 2>/dev/null | tr '\0' 0)" ] && echo "read: $path"
        done
        for path in /proc/sysrq-trigger /proc/sys/kernel/core_pattern /proc/sys/kernel/hostname \
            /proc/1/oom_score_adj /sys/kernel/uevent_helper /sys/fs/cgroup/x /.polydev/x \
            /.polydev/init /etc/x /proc/1/fd/1; do
            (: >>"$path") 2>/dev/null && echo "written: $path"
        done
        mount -t tmpfs none /tmp 2>/dev/null && echo "mounted"
        unshare --user --map-root-user true 2>/dev/null && echo "a user namespace"
        mknod /tmp/memory c 1 1 2>/dev/null && echo "a device"
        chroot / true 2>/dev/null && echo "a root"
        while read -r name value; do
            case $name in CapInh:|CapPrm:|CapEff:|CapAmb:) [ "$value" = 0000000000000000 ] || echo "$name $value";;
                NoNewPrivs:) [ "$value" = 1 ] || echo "new privileges";;
                Seccomp:) [ "$value" = 2 ] || echo "no filter";; esac
        done </proc/self/status
        node -e '
            const link = require("net").connect("/.polydev/link/init.sock");
            link.on("data", () => console.log("told by the driver"));
            link.on("close", () => process.exit()).on("error", () => {{}});
            setTimeout(() => process.exit(), 3000);
        '
        echo done
        "#
    )
}

#[test]
fn a_command_reaches_no_socket_and_no_file_of_the_host_or_of_init() {
    let shim = Shim::dev(&["anthropic=1"]);
    let script = grabs(&shim.state_dir());
    let outcome = shim.client().run(shell("anthropic", &script)).unwrap();
    assert_eq!(outcome.stdout(), "done\n", "{}", outcome.stderr());

    let nomad = Nomad::start_with("no_new_privileges = true");
    let mut config = job::shell(&grabs(&nomad.state_dir()));
    merge(&mut config, json!({ "image": image() }));
    nomad.submit(&batch("grabs", config));
    let alloc = nomad.wait_dead("grabs");
    let told = nomad.logs(job::id(&alloc), "stdout");
    // Init of a plain task has what its command has, and its streams are for others to write to.
    let own = "there: /proc/1/root/etc\nread: /proc/1/environ\nread: /proc/1/maps\n\
        written: /proc/1/oom_score_adj\nwritten: /proc/1/fd/1\n";
    assert_eq!(String::from_utf8_lossy(&told), format!("{own}done\n"));
}

#[test]
fn process_1_of_a_plain_task_has_nothing_that_its_command_has_not() {
    let nomad = Nomad::start();
    let script = r#"
        tr '\0' '\n' </proc/1/environ | while IFS= read -r variable; do
            env | grep -qxF "$variable" || echo "beside: $variable"
        done
        for link in /proc/1/fd/*; do
            case $(readlink "$link") in
                /dev/null|/dev/urandom|pipe:*|*/.task.std*.fifo|socket:*|anon_inode:*|/proc/*/oom_score_adj) ;;
                *) echo "open: $link $(readlink "$link")";;
            esac
        done
        echo done
    "#;
    nomad.submit(&batch("shown", job::shell(script)));
    let alloc = nomad.wait_dead("shown");
    let told = nomad.logs(job::id(&alloc), "stdout");
    assert_eq!(String::from_utf8_lossy(&told), "done\n");
}
