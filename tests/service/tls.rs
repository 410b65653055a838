//! Which remote callers the shim accepts, and which settings it refuses because they would
//! accept anybody.

use std::{
    fs,
    io::Read,
    net::TcpStream,
    process::Command,
    time::{Duration, Instant},
};

use polydev_client::Files;
use polydev_proto::runtime::ListPoolsRequest;
use polydev_tests::{client::Client, process::output, program, wait_until};
use rcgen::SanType;

use crate::{
    certificates::{Tls, files, make, sign, words},
    site::{LIMIT, Site, myself},
};

const CONTROLLER: &str = "spiffe://polydev.test/controller";

fn roles() -> String {
    let myself = myself();
    format!("[[role]]\nmembers = [\"{CONTROLLER}\", \"{myself}\"]\nmay = [\"run\"]\n")
}

/// Fails if a caller gets no answer.
fn ask(connected: Result<Client, String>) -> Result<(), String> {
    let client = connected?;
    let pools = client.call(async |mut shim| shim.list_pools(ListPoolsRequest {}).await);
    pools.map(drop).map_err(|status| status.to_string())
}

#[track_caller]
fn is_refused(connected: Result<Client, String>) {
    assert!(ask(connected).is_err(), "the caller was accepted");
}

#[test]
fn nobody_is_let_in_whom_our_authority_does_not_know() {
    let tls = Tls::with_roles(&roles());
    let _site = Site::start_with(&[], &words(&tls.options()));
    let (ours, others) = (tls.ours(), tls.others());
    make(&others);
    let connect = |files: Files| Client::connect_as(&tls.url, files);
    ask(connect(tls.files("controller"))).unwrap();
    is_refused(connect(files(&others, "controller", &ours)));
    is_refused(connect(files(&ours, "controller", &others)));
    let yesterday = time::OffsetDateTime::now_utc() - time::Duration::days(1);
    sign(&ours, "expired", |params| {
        params.not_before = yesterday - time::Duration::days(1);
        params.not_after = yesterday;
        let uri = CONTROLLER.try_into().expect("a valid URI");
        params.subject_alt_names.push(SanType::URI(uri));
    });
    is_refused(connect(tls.files("expired")));
    // This certificate contains no name of its owner.
    sign(&ours, "nameless", |params| {
        params.distinguished_name = rcgen::DistinguishedName::new();
    });
    is_refused(connect(tls.files("nameless")));
    is_refused(Client::try_connect(&tls.url.replace("https", "http")));
}

#[test]
fn who_says_nothing_keeps_nobody_out_and_is_shown_the_door() {
    let tls = Tls::with_roles(&roles());
    let _site = Site::start_with(&[], &words(&tls.options()));
    let address = tls.url.trim_start_matches("https://").to_owned();
    let connect = || TcpStream::connect(&address).unwrap();
    // More than handshakes could once be going on at a time.
    let silent: Vec<_> = (0..300).map(|_| connect()).collect();
    let before = Instant::now();
    ask(Client::connect_as(&tls.url, tls.files("controller"))).unwrap();
    assert!(before.elapsed() < Duration::from_secs(5));
    for mut stream in &silent {
        let limit = Some(Duration::from_secs(30));
        stream.set_read_timeout(limit).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
}

/// New connections need the new certificates; existing connections continue.
#[test]
fn new_certificates_hold_without_a_restart() {
    let tls = Tls::with_roles(&roles());
    let site = Site::start_with(&[], &words(&tls.options()));
    let (ours, others) = (tls.ours(), tls.others());
    make(&others);
    let client = Client::connect_as(&tls.url, tls.files("controller")).unwrap();
    for name in ["shim.pem", "shim-key.pem", "ca.pem"] {
        fs::copy(others.join(name), ours.join(name)).unwrap();
    }
    let of_others = || Client::connect_as(&tls.url, files(&others, "controller", &others));
    wait_until("the new certificates", LIMIT, || ask(of_others()));
    is_refused(Client::connect_as(
        &tls.url,
        files(&ours, "controller", &others),
    ));
    ask(Ok(client)).unwrap();

    // Certificates that are not valid change nothing.
    let warnings = || site.shim.process.log().matches(" WARN ").count();
    let warned = warnings();
    fs::write(ours.join("shim.pem"), "nonsense").unwrap();
    wait_until("the warning", LIMIT, || {
        ask(of_others()).expect("the last certificates are in use");
        let log = || site.shim.process.log();
        (warnings() > warned).then_some(()).ok_or_else(log)
    });
}

/// Neither of the commands that serve does.
#[track_caller]
fn fails(options: &[&str], words: &str) {
    for command in ["serve", "dev"] {
        let mut shim = Command::new(program("polydev-shim"));
        let output = output(shim.arg(command).args(options));
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        let is_so = !output.status.success() && printed.contains(words);
        assert!(is_so, "{command} {options:?}: {printed}");
    }
}

#[test]
fn a_shim_that_would_let_in_anybody_does_not_start() {
    let tls = Tls::with_roles(&roles());
    let ours = tls.ours();
    let path = |name: &str| ours.join(name).display().to_string();
    let (roles, wrong) = (path("roles.toml"), path("wrong.toml"));
    for address in [
        "http://0.0.0.0:7070",
        "http://198.18.0.1:7070",
        "tcp://127.0.0.1:1",
    ] {
        fails(&["--listen", address], address);
    }
    let everywhere = ["--listen", "http://0.0.0.0:7070"];
    fails(&everywhere, "not a loopback address");
    fails(&["--listen", &tls.url, "--roles", &roles], "--tls-cert");
    let certificate = path("shim.pem");
    fails(
        &["--listen", &tls.url, "--tls-cert", &certificate],
        "--tls-key",
    );
    let mut options = tls.options();
    let without_roles = options.len() - 2;
    fails(&words(&options[..without_roles]), "--roles must say");
    let authority = options.iter().position(|word| *word == path("ca.pem"));
    options[authority.unwrap()] = "/nowhere.pem".into();
    fails(&words(&options), "cannot read `/nowhere.pem`");
    fs::write(&wrong, "[[role]]\nmembers = [\"a\"]\nmay = [\"fly\"]\n").unwrap();
    fails(&["--roles", &wrong], "fly");
}

#[test]
fn certificates_replace_nothing_and_have_proper_names() {
    let tls = Tls::with_roles(&roles());
    let certs = |arguments: &[&str], folder: &std::path::Path| {
        let mut command = Command::new(program("polydev-shim"));
        let made = output(command.args(["certs", "dev"]).args(arguments).arg(folder));
        made.status.success()
    };
    assert!(!certs(&[], &tls.ours()), "files were replaced");
    assert!(!certs(&["--name", "a b"], &tls.others()) && !tls.others().exists());
}
