//! What packages of the shim need: readiness, completions, manual pages.

use std::{
    fs,
    os::unix::net::{UnixDatagram, UnixStream},
    process::Command,
    time::Duration,
};

use nix::sys::signal::Signal;
use polydev_tests::{
    client::shell,
    folder::Folder,
    nomad::Nomad,
    process::{Process, output, succeed},
    program,
    shim::Shim,
    wait_until,
};
use serde_json::Value;

#[test]
fn systemd_is_told_when_a_shim_serves_and_when_it_stops() {
    let folder = Folder::new("pdtest-");
    let [notify, socket, log] = ["notify", "shim.sock", "log"].map(|name| folder.path().join(name));
    let told = UnixDatagram::bind(&notify).unwrap();
    told.set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let mut words = [0; 64];
    let mut next = || {
        let length = told.recv(&mut words).unwrap();
        String::from_utf8_lossy(&words[..length]).trim().to_owned()
    };

    // The shim serves even if Nomad does not answer. A file contains the addresses.
    let config = folder.path().join("shim.toml");
    let listen = format!("listen = [\"unix://{}\"]\n", socket.display());
    fs::write(&config, listen + "nomad_addr = \"http://127.0.0.1:1\"\n").unwrap();
    let mut command = Command::new(program("polydev-shim"));
    command.args(["serve", "--config"]).arg(&config);
    command.env("NOTIFY_SOCKET", &notify);
    // A machine may have no authorities: plain HTTP needs none.
    command.envs([("SSL_CERT_FILE", "/nowhere"), ("SSL_CERT_DIR", "/nowhere")]);
    let mut shim = Process::start(&mut command, &log);
    assert_eq!(next(), "READY=1");
    UnixStream::connect(&socket).expect("what is ready listens");
    shim.signal(Signal::SIGTERM);
    assert_eq!(next(), "STOPPING=1");
    let status = wait_until("the shim's end", Duration::from_secs(20), || {
        shim.exit().ok_or_else(|| shim.log())
    });
    assert!(status.success(), "{status}");
}

/// Removes the folder of the sockets that are for a group, if nothing is in it.
struct Sockets;

impl Drop for Sockets {
    fn drop(&mut self) {
        let _others_are_in_it = fs::remove_dir("/run/polydev-node");
    }
}

#[test]
fn a_shim_that_is_not_root_reaches_a_node_by_its_group_alone() {
    // Every Debian has these groups.
    let (group, others, nobody) = ("games", "nogroup", 65534);
    let _sockets = Sockets;
    let nomad = Nomad::start_with(&format!("socket_group = \"{group}\""));
    nomad.submit_pool("anthropic", 1);
    let outsider = Shim::serve_as(nobody, others, &nomad.address);
    let shim = Shim::serve_as(nobody, group, &nomad.address);
    let client = shim.client();
    client.wait_idle("anthropic", 1);
    let outcome = client.run(shell("anthropic", "echo hello")).unwrap();
    assert_eq!(outcome.stdout(), "hello\n");
    let refused = outsider.client().run(shell("anthropic", "true"));
    let refused = refused.map(drop).unwrap_err();
    assert!(refused.message().contains("node"), "{refused}");
    assert!(outsider.process.log().contains("Permission denied"));
}

#[test]
fn a_configuration_is_checked_before_it_is_used() {
    let folder = Folder::new("pdtest-");
    let certificates = folder.path().join("certs");
    let shim = || Command::new(program("polydev-shim"));
    succeed(shim().args(["certs", "dev"]).arg(&certificates));
    let file = |name: &str| certificates.join(name).display().to_string();
    let config = folder.path().join("shim.toml");
    let text = format!(
        "listen = [\"https://127.0.0.1:7443\"]\ntls_cert = {:?}\ntls_key = {:?}\ntls_ca = {:?}\n\
         roles = {:?}\non_demand = 5\n",
        file("shim.pem"),
        file("shim-key.pem"),
        file("ca.pem"),
        file("roles.toml"),
    );
    fs::write(&config, &text).unwrap();
    let check = || {
        let mut command = shim();
        command.args(["config", "check", "--output", "json", "--config"]);
        command.arg(&config);
        command
    };
    // Options override the environment, which overrides the file.
    let mut command = check();
    command
        .args(["--on-demand", "7"])
        .env("NOMAD_ADDR", "http://127.0.0.1:1");
    let printed = succeed(&mut command);
    let rows = printed
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let rows: Vec<Value> = rows.collect();
    let row = |key: &str| rows.iter().find(|row| row["key"] == key).unwrap();
    assert_eq!(row("on_demand")["values"][0], "7");
    assert_eq!(row("nomad_addr")["from"], "environment");
    assert_eq!(row("listen")["values"][0], "https://127.0.0.1:7443");
    assert!(rows.iter().all(|row| row["key"] != "credential_store"));

    for (wrong, words) in [
        (
            "rolez = \"x\"",
            "`rolez` is an unknown key; allowed are listen,",
        ),
        ("user_queued = \"many\"", "--user-queued"),
        (
            "credential_store = \"postgres://a:hunter2@db/x\"",
            "PGPASSWORD",
        ),
        (
            "master_key_file = \"/nowhere\"",
            "cannot read the master keys",
        ),
    ] {
        fs::write(&config, format!("{text}{wrong}\n")).unwrap();
        let refused = output(&mut check());
        let printed = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && printed.contains(words),
            "{printed}"
        );
        assert!(!printed.contains("hunter2"), "{printed}");
    }
    fs::write(certificates.join("shim.pem"), "nonsense").unwrap();
    fs::write(&config, &text).unwrap();
    let refused = output(&mut check());
    let printed = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(printed.contains("shim.pem"), "{printed}");
}

#[test]
fn every_command_has_a_manual_page_and_completions() {
    let folder = Folder::new("pdtest-");
    let shim = || Command::new(program("polydev-shim"));
    succeed(shim().arg("man").arg(folder.path().join("man")));
    let page = |name: &str| {
        let path = folder.path().join("man").join(format!("{name}.1"));
        fs::read_to_string(path).unwrap()
    };
    assert!(page("polydev-shim").contains("isolated containers"));
    assert!(page("polydev-shim-runs-list").contains("\\-\\-limit"));
    assert!(page("polydev-shim-pool-scale").contains("Number of warm slots"));

    let script = folder.path().join("completions");
    fs::write(&script, succeed(shim().args(["completions", "bash"]))).unwrap();
    // The words that bash requests as completions of `polydev-shim runs `.
    let ask = "source $0; COMP_WORDS=(polydev-shim runs ''); COMP_CWORD=2; \
        _polydev-shim polydev-shim '' runs; echo ${COMPREPLY[@]}";
    let offered = succeed(Command::new("bash").args(["-c", ask]).arg(&script));
    for command in ["list", "show", "attach", "cancel"] {
        assert!(offered.contains(command), "{offered}");
    }
}
