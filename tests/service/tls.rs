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
    certificates::{Tls, files, make, revoke, sign, words},
    site::{LIMIT, Site, myself, steps},
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
    let warnings = || site.shim.process.log().matches(r#""level":"WARN""#).count();
    let warned = warnings();
    fs::write(ours.join("shim.pem"), "nonsense").unwrap();
    wait_until("the warning", LIMIT, || {
        ask(of_others()).expect("the last certificates are in use");
        let log = || site.shim.process.log();
        (warnings() > warned).then_some(()).ok_or_else(log)
    });
}

#[test]
fn a_certificate_that_is_taken_back_opens_nothing_and_its_connections_end() {
    let tls = Tls::with_roles(&roles());
    let ours = tls.ours();
    let (now, day) = (time::OffsetDateTime::now_utc(), time::Duration::days(1));
    for (name, number) in [("first", 0xf1_u64), ("second", 0xf2)] {
        sign(&ours, name, |params| {
            params.serial_number = Some(number.into());
            let uri = CONTROLLER.try_into().expect("a valid URI");
            params.subject_alt_names.push(SanType::URI(uri));
        });
    }
    revoke(&ours, &[], now + day);
    let mut options = tls.options();
    let list = ours.join("crl.pem").display().to_string();
    options.extend(["--tls-crl".to_owned(), list]);
    let site = Site::start_with(&[("anthropic", 2)], &words(&options));
    let connect = |name: &str| Client::connect_as(&tls.url, tls.files(name));
    let (first, second) = (connect("first").unwrap(), connect("second").unwrap());
    let [run, mut other] = [&first, &second].map(|client| client.start(steps(&["wait"])).unwrap());

    revoke(&ours, &[0xf1], now + day);
    let revoked = Instant::now();
    assert!(first.finish(run).is_err(), "it goes on");
    assert!(
        revoked.elapsed() < Duration::from_secs(5),
        "{:?}",
        revoked.elapsed()
    );
    is_refused(connect("first"));
    second.cancel(&other.accepted.run_id).unwrap();
    while second.next(&mut other).unwrap().is_some() {}

    // A list that nobody renews says nothing about who was taken back since.
    revoke(&ours, &[], now - day);
    wait_until("nobody is let in", LIMIT, || match ask(connect("second")) {
        Ok(()) => Err(site.shim.process.log()),
        Err(_) => Ok(()),
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

/// Measures; beside other tests the figures would mean nothing.
mod long {
    use std::{
        net::{Ipv4Addr, SocketAddr},
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        time::{Duration, Instant},
    };

    use polydev_tests::client::Client;
    use tokio::{
        net::{TcpSocket, TcpStream},
        runtime::Runtime,
        time::interval,
    };

    use super::{ask, roles};
    use crate::{
        certificates::{Tls, words},
        site::Site,
    };

    const CONNECTIONS: usize = 20_000;
    /// So many addresses have more connections than there are places.
    const ADDRESSES: usize = 20;
    const SAMPLES: usize = 500;
    /// What a handshake begins with, which never comes to its end.
    const BEGIN: [u8; 6] = [0x16, 3, 1, 2, 0, 1];

    async fn open(from: usize, to: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().expect("a socket");
        let from = Ipv4Addr::new(127, 0, 1, u8::try_from(from).expect("few addresses") + 1);
        let bound = socket.bind((from, 0).into());
        bound.expect("all of 127/8 is this machine");
        socket.connect(to).await.expect("somebody listens")
    }

    fn is_open(stream: &TcpStream) -> bool {
        let read = stream.try_read(&mut [0; 1]);
        read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// Half of them say nothing, and half a byte now and then.
    async fn crowd(to: SocketAddr, opened: Arc<AtomicUsize>) {
        let (mut silent, mut slow) = (Vec::new(), Vec::new());
        // Not in bursts: the machine is shared with those who measure.
        let mut ticks = interval(Duration::from_millis(2));
        while opened.load(Ordering::Relaxed) < CONNECTIONS {
            ticks.tick().await;
            let count = opened.fetch_add(2, Ordering::Relaxed);
            let from = count / 2 % ADDRESSES;
            silent.push(open(from, to).await);
            let stream = open(from, to).await;
            let _closed = stream.try_write(&BEGIN);
            slow.push(stream);
            if count.is_multiple_of(2000) {
                silent.retain(is_open);
                slow.retain(|stream| stream.try_write(&[0]).is_ok() && is_open(stream));
            }
        }
    }

    fn sample(tls: &Tls) -> Duration {
        let before = Instant::now();
        ask(Client::connect_as(&tls.url, tls.files("controller"))).expect("an answer");
        before.elapsed()
    }

    fn p99(mut samples: Vec<Duration>) -> Duration {
        samples.sort_unstable();
        samples[samples.len() * 99 / 100]
    }

    #[test]
    fn a_caller_gets_in_among_20_000_silent_and_slow_connections_as_fast() {
        let tls = Tls::with_roles(&roles());
        let _site = Site::start_with(&[], &words(&tls.options()));
        let alone = p99((0..SAMPLES).map(|_| sample(&tls)).collect());
        let runtime = Runtime::new().unwrap();
        let opened = Arc::new(AtomicUsize::new(0));
        let to = tls.url.trim_start_matches("https://").parse().unwrap();
        let crowd = runtime.spawn(crowd(to, opened.clone()));
        let mut among = Vec::new();
        while !crowd.is_finished() || among.len() < SAMPLES {
            among.push(sample(&tls));
        }
        runtime.block_on(crowd).unwrap();
        let among = p99(among);
        println!(
            "p99 alone {alone:?}, among {} others {among:?}",
            opened.load(Ordering::Relaxed)
        );
        assert!(
            among <= 2 * alone,
            "alone {alone:?}, among others {among:?}"
        );
    }
}
