//! The program, and its connection to a driver.

use std::{
    fs,
    io::IoSlice,
    mem::MaybeUninit,
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
    frame,
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::{io::AsyncReadExt, net::UnixStream, time::timeout};

const LIMIT: Duration = Duration::from_secs(20);
/// Of nobody.
const UID: u32 = 64_987;

/// A broker of the test's own, which ends with it.
struct Process {
    child: Child,
    folder: tempfile::TempDir,
}

impl Process {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = UnixListener::bind(folder.path().join("broker.sock")).expect("a socket");
        let child = Command::new(env!("CARGO_BIN_EXE_polydev-broker"))
            .arg(format!("--uid={UID}"))
            .stdin(Stdio::from(OwnedFd::from(socket)))
            .spawn();
        Self {
            child: child.expect("the broker starts"),
            folder,
        }
    }

    async fn connect(&self) -> (Driver, Hello) {
        let path: PathBuf = self.folder.path().join("broker.sock");
        let stream = UnixStream::connect(path).await;
        let mut driver = Driver {
            stream: stream.expect("the broker listens"),
            input: BytesMut::new(),
        };
        match driver.next().await {
            from_broker::Message::Hello(hello) => (driver, hello),
            other => panic!("{other:?}"),
        }
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
}

impl Driver {
    async fn next(&mut self) -> from_broker::Message {
        loop {
            if let Some(FromBroker { message }) = frame::decode(&mut self.input).expect("a frame") {
                return message.expect("a message that is known");
            }
            let read = timeout(LIMIT, self.stream.read_buf(&mut self.input)).await;
            let count = read.expect("it is told in time").expect("it is connected");
            assert_ne!(count, 0, "the broker closed the connection");
        }
    }

    fn send(&self, message: to_broker::Message, socket: Option<&TcpListener>) {
        let message = ToBroker {
            message: Some(message),
        };
        let mut output = BytesMut::new();
        frame::encode(&message, &mut output).expect("a short message");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let sockets: Vec<_> = socket.iter().map(|socket| socket.as_fd()).collect();
        if !sockets.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&sockets));
        }
        let bytes = [IoSlice::new(&output)];
        let sent = sendmsg(&self.stream, &bytes, &mut ancillary, SendFlags::NOSIGNAL);
        assert_eq!(sent.expect("the broker reads"), output.len());
    }

    fn open(&self, container: &str) -> TcpListener {
        let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
        let open = Open {
            container: container.into(),
            bytes_per_second: 1 << 20,
        };
        self.send(to_broker::Message::Open(open), Some(&socket));
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
    assert!(hello.containers.is_empty());
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
    };
    driver.send(to_broker::Message::Grant(grant), None);
    match driver.next().await {
        from_broker::Message::Refused(refused) => assert_eq!(refused.run_id, "run"),
        other => panic!("{other:?}"),
    }

    // Another life of the driver, while the last one is still connected.
    let (next, known) = process.connect().await;
    assert_eq!(known.public_key, hello.public_key);
    let mut names = known.containers;
    names.sort();
    assert_eq!(names, ["one", "two"]);
    let closed = Close {
        container: "one".into(),
    };
    next.send(to_broker::Message::Close(closed), None);
    drop(driver);
    drop(one);
    assert!(ask(&two).await.is_ok());
    let (_driver, known) = process.connect().await;
    assert_eq!(known.containers, ["two"]);
}
