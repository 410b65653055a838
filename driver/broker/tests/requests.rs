//! A container's requests through the broker, to an API of the test's own.

mod api;

use std::{net::SocketAddr, time::Duration};

use api::Api;
use polydev_broker::{broker::Broker, upstream::Upstreams};
use polydev_proto::{
    broker::{Grant, Key, Keys, Open, Upstream, from_broker::Message},
    provider::Provider,
    sealed::{PrivateKey, seal_keys},
};
use reqwest::{Client, StatusCode};
use rustls::RootCertStore;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};

const RUN: &str = "0192d4e0-0000-7000-8000-000000000001";
const FAST: u64 = 1 << 30;
const LIMIT: Duration = Duration::from_secs(20);

/// A broker before an API that answers for all three providers.
struct Node {
    broker: Broker,
    told: mpsc::Receiver<Message>,
    api: Api,
}

impl Node {
    async fn new() -> Self {
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let api = Api::serve().await;
        let upstreams = Upstreams::new(RootCertStore::empty()).expect("TLS");
        let (broker, told) = Broker::new(PrivateKey::generate(), upstreams);
        Self { broker, told, api }
    }

    /// Opens a container; returns what it connects to.
    async fn open(&self, container: &str) -> SocketAddr {
        let upstream = |provider: Provider| Upstream {
            provider: provider.to_string(),
            base_url: format!("http://{}", self.api.address),
            ..Upstream::default()
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let open = Open {
            container: container.into(),
            bytes_per_second: FAST,
            upstreams: Provider::all().map(upstream).collect(),
            grant: None,
        };
        self.broker.open(&open, listener).expect("it is opened");
        address
    }

    fn grant(&self, container: &str, run_id: &str, keys: &[(&str, &str)]) -> Message {
        let keys = Keys {
            keys: keys
                .iter()
                .map(|(provider, value)| Key {
                    provider: (*provider).into(),
                    value: value.as_bytes().to_vec().into(),
                })
                .collect(),
        };
        let sealed_keys =
            seal_keys(&self.broker.public_key(), run_id, &keys).expect("a key of the broker");
        self.broker.grant(&Grant {
            container: container.into(),
            run_id: run_id.into(),
            sealed_keys,
            bytes_per_second: 2 * FAST,
        })
    }

    fn granted(&self, container: &str, run_id: &str, keys: &[(&str, &str)]) {
        let told = self.grant(container, run_id, keys);
        assert!(matches!(told, Message::Granted(_)), "{told:?}");
    }

    async fn told(&mut self) -> Message {
        let told = timeout(LIMIT, self.told.recv())
            .await
            .expect("it is told in time");
        told.expect("the broker is there")
    }
}

#[tokio::test]
async fn the_users_key_takes_the_place_of_the_containers() {
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("anthropic", "users"), ("openai", "users")]);
    let client = Client::new();
    for (path, name, value) in [
        ("anthropic/v1/messages?beta=true", "x-api-key", "users"),
        ("openai/v1/responses", "authorization", "Bearer users"),
    ] {
        let sent = client
            .post(format!("http://{address}/{path}"))
            .header("x-api-key", "placeholder")
            .header("authorization", "Bearer placeholder")
            .body("what it sends");
        let answer = sent.send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.text().await.unwrap(), "what it sends");
        let seen = node.api.last();
        assert_eq!(seen.headers[name], value);
        assert_eq!(format!("/{}", path.split_once('/').unwrap().1), seen.uri);
        let all = format!("{:?}", seen.headers);
        assert!(!all.contains("placeholder"), "{all}");
    }
}

#[tokio::test]
async fn without_a_run_with_its_key_nothing_reaches_an_api() {
    let node = Node::new().await;
    let address = node.open("one").await;
    let ask = async |path: &str| {
        let sent = Client::new().post(format!("http://{address}{path}"));
        let answer = sent.send().await.unwrap();
        let retry = answer.headers().get("x-should-retry").cloned();
        assert_eq!(retry.unwrap(), "false");
        (answer.status(), answer.text().await.unwrap())
    };
    let (status, text) = ask("/anthropic/v1/messages").await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(text.contains("no run has this container"), "{text}");

    // Keys of another run, or for another broker, give nothing.
    let keys = Keys::default();
    let sealed = seal_keys(&node.broker.public_key(), "another", &keys).unwrap();
    let told = node.broker.grant(&Grant {
        container: "one".into(),
        run_id: RUN.into(),
        sealed_keys: sealed,
        bytes_per_second: FAST,
    });
    let Message::Refused(refused) = told else {
        panic!("it is granted");
    };
    assert_eq!(refused.run_id, RUN);
    assert_eq!(ask("/anthropic/v1/messages").await.0, StatusCode::FORBIDDEN);

    node.granted("one", RUN, &[("anthropic", "users")]);
    let (_, text) = ask("/openai/v1/responses").await;
    assert!(text.contains("this run has no key for openai"), "{text}");
    let (_, text) = ask("/anthropic/v1/organizations").await;
    assert!(text.contains("is not a path of anthropic"), "{text}");

    // A container takes no second run.
    let told = node.grant(
        "one",
        "0192d4e0-0000-7000-8000-000000000002",
        &[("openai", "others")],
    );
    assert!(matches!(told, Message::Refused(_)));
    let (_, text) = ask("/openai/v1/responses").await;
    assert!(text.contains("this run has no key for openai"), "{text}");
    assert_eq!(node.api.count(), 0);
}

#[tokio::test]
async fn a_stream_passes_piece_by_piece_and_breaks_with_its_run() {
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("anthropic", "users")]);
    let sent = Client::new().post(format!("http://{address}/anthropic/v1/messages"));
    let mut answer = sent.header("x-test", "stream").send().await.unwrap();
    for piece in ["one", "two"] {
        node.api.say(piece);
        let got = timeout(LIMIT, answer.chunk()).await.unwrap().unwrap();
        assert_eq!(got.unwrap(), piece);
    }
    node.broker.close("one");
    let broken = timeout(LIMIT, answer.chunk()).await.unwrap();
    assert!(broken.is_err(), "{broken:?}");
    timeout(LIMIT, node.api.unheard())
        .await
        .expect("the request to the API ends");
}

#[tokio::test]
async fn a_caller_that_goes_away_ends_its_request_to_the_api() {
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("anthropic", "users")]);
    let sent = Client::new().post(format!("http://{address}/anthropic/v1/messages"));
    let mut answer = sent.header("x-test", "stream").send().await.unwrap();
    node.api.say("one");
    assert_eq!(answer.chunk().await.unwrap().unwrap(), "one");
    drop(answer);
    timeout(LIMIT, node.api.unheard())
        .await
        .expect("the request to the API ends");
}

#[tokio::test]
async fn a_refused_key_is_told_and_not_tried_again() {
    let mut node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("anthropic", "users")]);
    let sent = Client::new().post(format!("http://{address}/anthropic/v1/messages"));
    let answer = sent.header("x-test", "401").send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(answer.headers()["x-should-retry"], "false");
    let Message::Answered(answered) = node.told().await else {
        panic!("the driver is not told");
    };
    assert_eq!((answered.status, &*answered.run_id), (401, RUN));
    assert_eq!(answered.provider, "anthropic");
}

#[tokio::test]
async fn redirects_and_missing_websockets_end_in_the_broker() {
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("openai", "users")]);
    let url = format!("http://{address}/openai/v1/responses");
    let redirected = Client::new()
        .get(&url)
        .header("x-test", "302")
        .send()
        .await
        .unwrap();
    assert_eq!(redirected.status(), StatusCode::BAD_GATEWAY);
    assert!(redirected.text().await.unwrap().contains("302"));
    let upgrade = Client::new()
        .get(&url)
        .header("connection", "Upgrade")
        .header("upgrade", "websocket");
    let answer = upgrade.header("x-test", "404").send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::UPGRADE_REQUIRED);
}

#[tokio::test]
async fn a_websocket_passes_both_ways_and_breaks_with_its_run() {
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("openai", "users")]);
    let mut socket = TcpStream::connect(address).await.unwrap();
    let request = "GET /openai/v1/responses HTTP/1.1\r\nhost: broker\r\nx-test: websocket\r\n\
                   connection: Upgrade\r\nupgrade: websocket\r\n\
                   authorization: Bearer placeholder\r\n\r\n";
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = timeout(LIMIT, socket.read_u8()).await;
        head.push(byte.expect("in time").expect("an answer"));
    }
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert_eq!(node.api.last().headers["authorization"], "Bearer users");
    for said in ["one", "two"] {
        socket.write_all(said.as_bytes()).await.unwrap();
        let mut heard = [0; 3];
        let read = timeout(LIMIT, socket.read_exact(&mut heard)).await;
        read.expect("in time").expect("an echo");
        assert_eq!(heard, said.as_bytes());
    }
    node.broker.close("one");
    let end = timeout(LIMIT, socket.read_u8()).await.expect("it ends");
    assert!(end.is_err(), "{end:?}");
}

#[tokio::test]
async fn a_gateway_gets_its_headers_and_no_key_without_tls() {
    let node = Node::new().await;
    let gateway = async |scheme: &str, container: &str| {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let upstream = Upstream {
            provider: "anthropic".into(),
            base_url: format!("{scheme}://{}/team", node.api.address),
            headers: [("x-team".to_owned(), "research".to_owned())].into(),
            ..Upstream::default()
        };
        let open = Open {
            container: container.into(),
            bytes_per_second: FAST,
            upstreams: vec![upstream],
            grant: None,
        };
        node.broker.open(&open, listener).expect("it is opened");
        node.granted(container, RUN, &[("anthropic", "users")]);
        let sent = Client::new().post(format!("http://{address}/anthropic/v1/messages"));
        sent.send().await.expect("an answer").status()
    };
    assert_eq!(gateway("http", "one").await, StatusCode::OK);
    let seen = node.api.last();
    assert_eq!(seen.uri, "/team/v1/messages");
    assert_eq!(seen.headers["x-team"], "research");
    // The API speaks no TLS, so the key stays here.
    assert_eq!(gateway("https", "two").await, StatusCode::BAD_GATEWAY);
    assert_eq!(node.api.count(), 1);
}

#[tokio::test]
async fn what_is_held_is_what_the_next_broker_needs() {
    let node = Node::new().await;
    node.open("one").await;
    assert_eq!(node.broker.held()[0].grant, None);
    let told = node.grant("one", RUN, &[("openai", "users")]);
    assert!(matches!(told, Message::Granted(_)), "{told:?}");
    let held = node.broker.held().remove(0);
    assert_eq!(held.bytes_per_second, 2 * FAST, "the run's rate");

    // One with the same key serves the run from the first request on.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    node.broker.close("one");
    node.broker.open(&held, listener).expect("it is opened");
    let sent = Client::new().post(format!("http://{address}/openai/v1/responses"));
    assert_eq!(sent.send().await.unwrap().status(), StatusCode::OK);
    assert_eq!(node.api.last().headers["authorization"], "Bearer users");
}
