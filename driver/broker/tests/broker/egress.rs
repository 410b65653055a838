//! What a container reaches through the broker beside its model, on servers of the test's own.

use std::net::SocketAddr;

use polydev_proto::broker::{Destination, Egress, Grant, Open, from_broker::Message};
use reqwest::{Client, Proxy, StatusCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};

use crate::node::{self, FAST, LIMIT, RUN};

/// A broker with one container.
struct Node {
    node: node::Node,
    container: SocketAddr,
}

impl Node {
    async fn new(allow: &[&str]) -> Self {
        let node = node::Node::new().await;
        let allow = allow.iter().map(ToString::to_string).collect();
        let open = Open {
            egress: Some(Egress { allow }),
            ..Open::default()
        };
        let container = node.open_with("one", open).await;
        Self { node, container }
    }

    /// A run without keys has the container.
    fn grant(&self, bytes_per_second: u64) {
        let told = self.node.broker.grant(&Grant {
            container: "one".into(),
            run_id: RUN.into(),
            bytes_per_second,
            ..Grant::default()
        });
        assert!(matches!(told, Message::Granted(_)), "{told:?}");
    }

    /// A program in the container that uses the broker as its proxy.
    fn client(&self) -> Client {
        let proxy = Proxy::all(format!("http://{}", self.container)).expect("a URL");
        Client::builder().proxy(proxy).build().expect("a client")
    }

    /// Asks for a tunnel; returns the answer's first line, and the connection.
    async fn connect(&self, target: &str) -> (String, TcpStream) {
        let mut stream = TcpStream::connect(self.container)
            .await
            .expect("it listens");
        let asked = format!("CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n");
        stream.write_all(asked.as_bytes()).await.expect("it reads");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let byte = timeout(LIMIT, stream.read_u8()).await.expect("an answer");
            head.push(byte.expect("the connection holds"));
        }
        let head = String::from_utf8(head).expect("text");
        (head.lines().next().unwrap_or_default().to_owned(), stream)
    }

    /// Ends the container; returns the record of its run.
    fn close(&self) -> Vec<Destination> {
        self.node.close("one").destinations
    }
}

/// A server that sends back what it receives.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _broken = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    address
}

/// A server that answers each connection's request with the head of what it received.
async fn mirror() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let Ok(byte) = stream.read_u8().await else {
                    break;
                };
                head.push(byte);
            }
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nset-cookie: a=b\r\n\r\n",
                head.len()
            );
            let _broken = stream.write_all(&[answer.as_bytes(), &head].concat()).await;
        }
    });
    address
}

#[tokio::test]
async fn a_tunnel_carries_bytes_both_ways_and_is_on_record() {
    let server = echo().await;
    let node = Node::new(&["127.0.0.1/32"]).await;
    node.grant(FAST);
    let (status, mut stream) = node.connect(&server.to_string()).await;
    assert_eq!(status, "HTTP/1.1 200 OK");
    let sent: Vec<u8> = (0..300_000_u32).flat_map(u32::to_be_bytes).collect();
    let (mut from, mut to) = stream.split();
    let echoed = async {
        let mut received = vec![0; sent.len()];
        from.read_exact(&mut received).await.map(|_| received)
    };
    let (written, received) = tokio::join!(to.write_all(&sent), timeout(LIMIT, echoed));
    written.unwrap();
    assert!(received.unwrap().unwrap() == sent, "the bytes are others");
    // One side's end is the other's.
    to.shutdown().await.unwrap();
    assert_eq!(
        timeout(LIMIT, from.read(&mut [0])).await.unwrap().unwrap(),
        0
    );

    let record = node.close();
    let [destination] = &record[..] else {
        panic!("{record:?}")
    };
    let expected = Destination {
        host: "127.0.0.1".into(),
        port: server.port().into(),
        address: "127.0.0.1".into(),
        denied: String::new(),
        connections: 1,
        sent_bytes: sent.len() as u64,
        received_bytes: sent.len() as u64,
        failed: 0,
    };
    assert_eq!(*destination, expected);
}

#[tokio::test]
async fn a_request_without_tls_passes_with_the_commands_own_credentials() {
    let server = mirror().await;
    let node = Node::new(&["localhost", "127.0.0.1", "::1"]).await;
    node.grant(FAST);
    let url = format!("http://user:word@localhost:{}/path?query=1", server.port());
    let asked = node.client().get(url).header("cookie", "c=d");
    let answer = asked
        .header("proxy-authorization", "Basic x")
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.headers()["set-cookie"], "a=b");
    let head = answer.text().await.unwrap();
    assert!(head.starts_with("GET /path?query=1 HTTP/1.1\r\n"), "{head}");
    let lower = head.to_ascii_lowercase();
    assert!(
        lower.contains(&format!("\r\nhost: localhost:{}\r\n", server.port())),
        "{head}"
    );
    assert!(lower.contains("\r\nauthorization: basic ") && lower.contains("\r\ncookie: c=d"));
    assert!(!lower.contains("proxy-"), "{head}");
    let record = node.close();
    assert_eq!((&*record[0].host, record[0].connections), ("localhost", 1));
    assert!(
        record[0].sent_bytes > 50 && record[0].received_bytes > 50,
        "{record:?}"
    );
}

#[tokio::test]
async fn what_is_not_allowed_is_told_to_the_program_and_the_driver() {
    let server = echo().await;
    let node = Node::new(&["localhost", "*.example.org:443"]).await;
    let target = server.to_string();
    assert_eq!(
        node.connect(&target).await.0,
        "HTTP/1.1 403 Forbidden",
        "before the run"
    );
    node.grant(FAST);
    let (status, _) = node.connect(&target).await;
    assert_eq!(
        status,
        format!("HTTP/1.1 403 {target}: not in the job's egress.allow")
    );
    assert_eq!(
        node.node.news().await.destinations[0].denied,
        "not in the job's egress.allow"
    );

    // A name that is allowed does not open what it leads to.
    let (status, _) = node.connect(&format!("localhost:{}", server.port())).await;
    assert!(status.contains(" is not public, "), "{status}");
    for (target, expected) in [
        ("169.254.169.254:80", "HTTP/1.1 403 "),
        ("[::ffff:127.0.0.1]:80", "HTTP/1.1 403 "),
        ("example.org:443", "HTTP/1.1 403 "),
        ("a.example.org:80", "HTTP/1.1 403 "),
        ("127.1:80", "HTTP/1.1 400 "),
        ("localhost", "HTTP/1.1 400 "),
    ] {
        let (status, _) = node.connect(target).await;
        assert!(status.starts_with(expected), "{target}: {status}");
    }
    let plain = node
        .client()
        .get(format!("http://{target}/"))
        .send()
        .await
        .unwrap();
    assert_eq!(plain.status(), StatusCode::FORBIDDEN);
    let record = node.close();
    assert_eq!(record.len(), 8, "{record:?}");
    assert!(
        record
            .iter()
            .all(|known| !known.denied.is_empty() && known.address.is_empty())
    );
    assert_eq!(record[0].connections, 2);
}

#[tokio::test]
async fn a_tunnel_keeps_to_the_rate_and_ends_with_its_run() {
    let server = echo().await;
    let node = Node::new(&["127.0.0.1"]).await;
    // 10 Mbit/s.
    node.grant(1_250_000);
    let (_, mut stream) = node.connect(&server.to_string()).await;
    let begun = Instant::now();
    let (mut from, mut to) = stream.split();
    let sent = vec![7; 1_250_000];
    let echoed = async {
        let mut received = vec![0; sent.len()];
        from.read_exact(&mut received).await
    };
    let (written, received) = tokio::join!(to.write_all(&sent), timeout(LIMIT, echoed));
    written.unwrap();
    received.unwrap().unwrap();
    let took = begun.elapsed().as_secs_f64();
    // A burst of 50 ms is free.
    assert!(took > 0.9, "{took} s");

    node.close();
    let ended = timeout(LIMIT, stream.read(&mut [0; 1]))
        .await
        .expect("it ends");
    assert!(!matches!(ended, Ok(count) if count > 0));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_no_refusal() {
    let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = server.local_addr().expect("an address");
    drop(server);
    let node = Node::new(&["127.0.0.1", "*.invalid"]).await;
    node.grant(FAST);
    let (status, _) = node.connect(&address.to_string()).await;
    assert!(
        status.starts_with("HTTP/1.1 502 ") && status.contains("cannot connect"),
        "{status}"
    );
    let (status, _) = node.connect("nowhere.invalid:443").await;
    assert!(
        status.starts_with("HTTP/1.1 502 ") && status.contains("look up"),
        "{status}"
    );
    let record: Vec<_> = (node.close().into_iter())
        .map(|to| (to.host, to.connections, to.failed, to.denied))
        .collect();
    let failed = |host: &str| (host.to_owned(), 0, 1, String::new());
    assert_eq!(record, [failed("127.0.0.1"), failed("nowhere.invalid")]);
}
