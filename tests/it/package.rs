//! What whoever packages the shim relies on: readiness, completions, manual pages.

use std::{
    fs,
    os::unix::net::{UnixDatagram, UnixStream},
    process::Command,
    time::Duration,
};

use nix::sys::signal::Signal;
use polydev_tests::{
    folder::Folder,
    process::{Process, succeed},
    program, wait_until,
};

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

    // It serves whether Nomad answers or not.
    let mut command = Command::new(program("polydev-shim"));
    command
        .args(["serve", "--nomad-addr", "http://127.0.0.1:1", "--listen"])
        .arg(format!("unix://{}", socket.display()))
        .env("NOTIFY_SOCKET", &notify);
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
    assert!(page("polydev-shim-pool-scale").contains("Warm slots to keep"));

    let script = folder.path().join("completions");
    fs::write(&script, succeed(shim().args(["completions", "bash"]))).unwrap();
    // As bash asks for what may come after `polydev-shim runs `.
    let ask = "source $0; COMP_WORDS=(polydev-shim runs ''); COMP_CWORD=2; \
        _polydev-shim polydev-shim '' runs; echo ${COMPREPLY[@]}";
    let offered = succeed(Command::new("bash").args(["-c", ask]).arg(&script));
    for command in ["list", "show", "attach", "cancel"] {
        assert!(offered.contains(command), "{offered}");
    }
}
