//! The program, and its connection to a driver.

use std::{
    fs,
    io::ErrorKind,
    net::TcpListener,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use bytes::BytesMut;
use polydev_proto::{
    broker::{
        Close, FromBroker, Grant, Hello, Open, PROTOCOL_VERSION, ToBroker, from_broker, to_broker,
    },
    descriptors, frame,
};
use rustix::fs::{MemfdFlags, memfd_create};
use tokio::{net::UnixStream, task::spawn_blocking, time::timeout};

const LIMIT: Duration = Duration::from_secs(20);
/// Of nobody.
const UID: u32 = 64_987;

/// A broker of the test's own, which ends with it.
struct Process {
    child: Child,
    memory: OwnedFd,
    folder: tempfile::TempDir,
}

impl Process {
    fn start() -> Self {
        let memory = memfd_create("seed", MemfdFlags::CLOEXEC);
        Self::with(memory.expect("memory"))
    }

    fn with(memory: OwnedFd) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = UnixListener::bind(folder.path().join("broker.sock")).expect("a socket");
        let child = Command::new(env!("CARGO_BIN_EXE_polydev-broker"))
            .arg(format!("--uid={UID}"))
            .stdin(Stdio::from(OwnedFd::from(socket)))
            .stdout(Stdio::from(memory.try_clone().expect("a descriptor")))
            .spawn();
        Self {
            child: child.expect("the broker starts"),
            memory,
            folder,
        }
    }

    async fn connect(&self) -> (Driver, Hello) {
        let path: PathBuf = self.folder.path().join("broker.sock");
        let stream = UnixStream::connect(path).await;
        let mut driver = Driver {
            stream: stream.expect("the broker listens"),
            input: BytesMut::new(),
            held: Vec::new(),
        };
        let from_broker::Message::Hello(hello) = driver.next().await else {
            panic!("the broker does not greet");
        };
        for _ in 0..hello.held {
            let from_broker::Message::Held(held) = driver.next().await else {
                panic!("it holds fewer than it said");
            };
            driver.held.push(held.container);
        }
        driver.held.sort();
        (driver, hello)
    }

    fn status(&self, name: &str) -> String {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(path).expect("the broker runs");
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.expect("the kernel tells it").trim().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _status = self.child.wait();
    }
}

struct Driver {
    stream: UnixStream,
    input: BytesMut,
    /// The names of the containers that the broker had when this driver came.
    held: Vec<String>,
}

impl Driver {
    async fn next(&mut self) -> from_broker::Message {
        loop {
            if let Some(FromBroker { message }) = frame::decode(&mut self.input).expect("a frame") {
                return message.expect("a message that is known");
            }
            let readable = timeout(LIMIT, self.stream.readable()).await;
            readable
                .expect("it is told in time")
                .expect("it is connected");
            // A read ends where a descriptor came. tokio's `read_buf` takes that for the end of
            // what is there (findings/tokio-descriptor-short-read.sh).
            match self.stream.try_read_buf(&mut self.input) {
                Ok(0) => panic!("the broker closed the connection"),
                Err(error) if error.kind() != ErrorKind::WouldBlock => panic!("{error}"),
                _ => {}
            }
        }
    }

    fn send(&self, message: to_broker::Message, socket: Option<&TcpListener>) {
        let message = ToBroker {
            message: Some(message),
        };
        let mut output = BytesMut::new();
        frame::encode(&message, &mut output).expect("a short message");
        let sockets: Vec<_> = socket.iter().map(|socket| socket.as_fd()).collect();
        let sent = descriptors::send(&self.stream, &output, &sockets);
        assert_eq!(sent.expect("the broker reads"), output.len());
    }

    fn open(&self, container: &str) -> TcpListener {
        let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
        let open = Open {
            container: container.into(),
            bytes_per_second: 1 << 20,
            ..Open::default()
        };
        self.send(to_broker::Message::Open(open.into()), Some(&socket));
        socket
    }
}

async fn ask(socket: &TcpListener) -> reqwest::Result<String> {
    let _installed = rustls::crypto::ring::default_provider().install_default();
    let address = socket.local_addr().expect("an address");
    let url = format!("http://{address}/anthropic/v1/messages");
    let asked = timeout(LIMIT, reqwest::Client::new().post(url).send()).await;
    asked.expect("it answers in time")?.text().await
}

#[tokio::test]
async fn it_has_no_rights_and_no_memory_to_show() {
    let process = Process::start();
    let (_driver, hello) = process.connect().await;
    assert_eq!(hello.protocol_version, PROTOCOL_VERSION);
    assert_eq!(hello.public_key.len(), 32);
    let uids = process.status("Uid:");
    assert!(uids.split_whitespace().all(|uid| uid != "0"), "{uids}");
    for capabilities in ["CapPrm:", "CapEff:"] {
        assert_eq!(process.status(capabilities), "0000000000000000");
    }
    assert_eq!(process.status("NoNewPrivs:"), "1");
    let path = format!("/proc/{}/limits", process.child.id());
    let limits = fs::read_to_string(path).expect("the broker runs");
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"));
    let sizes: Vec<_> = core
        .expect("a limit")
        .split_whitespace()
        .skip(4)
        .take(2)
        .collect();
    assert_eq!(sizes, ["0", "0"]);
}

#[tokio::test]
async fn containers_come_with_their_sockets_and_stay_without_a_driver() {
    let process = Process::start();
    let (mut driver, hello) = process.connect().await;
    assert_eq!(hello.held, 0);
    let (one, two) = (driver.open("one"), driver.open("two"));
    for socket in [&one, &two] {
        let answer = ask(socket).await.expect("it is answered");
        assert!(answer.contains("no run has this container"), "{answer}");
    }
    let grant = Grant {
        container: "one".into(),
        run_id: "run".into(),
        sealed_keys: vec![0; 64].into(),
        bytes_per_second: 1 << 20,
        ..Grant::default()
    };
    driver.send(to_broker::Message::Grant(grant.into()), None);
    match driver.next().await {
        from_broker::Message::Refused(refused) => assert_eq!(refused.run_id, "run"),
        other => panic!("{other:?}"),
    }

    // Another life of the driver, while the last one is still connected.
    let (next, known) = process.connect().await;
    assert_eq!(known.public_key, hello.public_key);
    assert_eq!(next.held, ["one", "two"]);
    let closed = Close {
        container: "one".into(),
    };
    next.send(to_broker::Message::Close(closed), None);
    drop(driver);
    drop(one);
    assert!(ask(&two).await.is_ok());
    let (driver, _) = process.connect().await;
    assert_eq!(driver.held, ["two"]);
}

#[tokio::test]
async fn one_that_takes_the_place_of_a_dead_one_has_its_key() {
    let dead = Process::start();
    let (_driver, first) = dead.connect().await;
    let memory = dead.memory.try_clone().expect("a descriptor");
    drop(dead);
    let next = Process::with(memory);
    let (_driver, second) = next.connect().await;
    assert_eq!(first.public_key, second.public_key);
}

#[tokio::test]
async fn it_ends_when_its_driver_has_closed_every_container() {
    let process = Process::start();
    let (driver, _) = process.connect().await;
    let _one = driver.open("one");
    let container = "one".into();
    driver.send(to_broker::Message::Close(Close { container }), None);
    drop(driver);
    let ended = spawn_blocking(move || {
        let mut process = process;
        process.child.wait()
    });
    let ended = timeout(LIMIT, ended)
        .await
        .expect("it ends")
        .expect("no panic");
    assert!(ended.expect("it is a child").success());
}
