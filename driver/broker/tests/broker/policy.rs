//! What the role of a run's caller says: a budget, less egress, another server.

use std::net::SocketAddr;

use polydev_proto::{
    broker::{Budget, Destination, Egress, Open, Policy, Upstream, from_broker::Message},
    budget::today,
};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use reqwest::{Client, StatusCode};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::{
    api::Api,
    node::{LIMIT, Node, RUN},
    requests::{frame, websocket},
};

const KEYS: &[(&str, &str)] = &[("anthropic", "users"), ("openai", "users")];

/// A container whose run has the policy.
async fn with_policy(node: &Node, open: Open, policy: Policy) -> SocketAddr {
    let address = node.open_with("one", open).await;
    let told = node.grant_with("one", RUN, KEYS, Some(policy));
    assert!(matches!(told, Message::Granted(_)), "{told:?}");
    address
}

fn budget(requests: u64, tokens: u64) -> Policy {
    let budget = Budget {
        requests,
        tokens,
        used_requests: 7,
        used_tokens: 70,
        day: today(),
    };
    Policy {
        budget: Some(budget),
        ..Policy::default()
    }
}

/// A prompt whose answer states six tokens.
async fn prompt(address: SocketAddr) -> (StatusCode, String) {
    let said = r#"{"model": "m", "usage": {"input_tokens": 4, "output_tokens": 2}}"#;
    let sent = Client::new().post(format!("http://{address}/anthropic/v1/messages"));
    let answer = sent.body(said).send().await.expect("an answer");
    (answer.status(), answer.text().await.expect("its text"))
}

#[tokio::test]
async fn a_budget_of_requests_is_kept_with_the_requests_of_other_runs() {
    let node = Node::new().await;
    let address = with_policy(&node, Open::default(), budget(9, 0)).await;
    assert_eq!(prompt(address).await.0, StatusCode::OK);
    assert_eq!(prompt(address).await.0, StatusCode::OK);
    let listed = Client::new().get(format!("http://{address}/anthropic/v1/models"));
    assert_eq!(listed.send().await.unwrap().status(), StatusCode::OK);
    let (status, text) = prompt(address).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    let words = "the user's budget for today (UTC) is used up: 9 of 9 requests";
    assert!(text.contains(words), "{text}");
    assert_eq!(node.api.count(), 3, "it reaches no API");
    let seen = node.news().await;
    assert_eq!((seen.requests, &*seen.over_budget), (2, words));

    // The next broker goes on with what this one has counted.
    let held = node.broker.held().remove(0);
    node.close("one");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    node.broker.open(&held, listener).unwrap();
    assert_eq!(prompt(address).await.0, StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test]
async fn a_budget_of_tokens_ends_with_the_answer_that_exceeds_it() {
    let node = Node::new().await;
    let address = with_policy(&node, Open::default(), budget(0, 80)).await;
    assert_eq!(prompt(address).await.0, StatusCode::OK);
    assert_eq!(prompt(address).await.0, StatusCode::OK);
    assert!(
        node.close("one").over_budget.is_empty(),
        "nobody has asked for more"
    );

    let node = Node::new().await;
    let address = with_policy(&node, Open::default(), budget(0, 75)).await;
    assert_eq!(prompt(address).await.0, StatusCode::OK);
    let (status, text) = prompt(address).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    assert!(text.contains("76 of 75 tokens"), "{text}");
}

#[tokio::test]
async fn a_websocket_has_no_further_message_beyond_the_budget() {
    let node = Node::new().await;
    let address = with_policy(&node, Open::default(), budget(8, 0)).await;
    let mut socket = websocket(address).await;
    let completed = r#"{"type":"response.completed","response":{"model":"m","usage":{"input_tokens":5,"output_tokens":2}}}"#;
    let said = frame(1, true, completed);
    let mut heard = vec![0; said.len()];
    socket.write_all(&said).await.unwrap();
    let read = timeout(LIMIT, socket.read_exact(&mut heard)).await;
    read.expect("in time").expect("an answer");
    // A ping is no message, and hides none.
    let ping = frame(9, true, "\u{1}");
    socket.write_all(&ping).await.unwrap();
    let mut heard = vec![0; ping.len()];
    let read = timeout(LIMIT, socket.read_exact(&mut heard)).await;
    read.expect("in time").expect("an answer");
    socket
        .write_all(&[&ping[..], &said].concat())
        .await
        .unwrap();
    let end = timeout(LIMIT, socket.read_u8()).await.expect("it ends");
    assert!(end.is_err(), "{end:?}");
    let seen = node.close("one");
    assert_eq!(seen.requests, 1);
    assert!(
        seen.over_budget.ends_with("8 of 8 requests"),
        "{}",
        seen.over_budget
    );
}

#[tokio::test]
async fn a_websocket_that_hears_no_answer_counts_too() {
    let node = Node::new().await;
    let address = with_policy(&node, Open::default(), budget(9, 0)).await;
    let said = frame(2, true, "two messages in one piece");
    let mut socket = websocket(address).await;
    socket.write_all(&said).await.unwrap();
    let mut heard = vec![0; said.len()];
    let read = timeout(LIMIT, socket.read_exact(&mut heard)).await;
    read.expect("in time").expect("an echo");
    drop(socket);
    let mut socket = websocket(address).await;
    socket
        .write_all(&[&said[..], &said].concat())
        .await
        .unwrap();
    let end = timeout(LIMIT, socket.read_u8()).await.expect("it ends");
    assert!(end.is_err(), "{end:?}");
    let seen = node.close("one");
    assert_eq!(seen.requests, 2);
    assert!(seen.over_budget.ends_with("9 of 9 requests"));
}

#[tokio::test]
async fn a_role_reaches_less_than_its_pool_and_never_more() {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = server.local_addr().unwrap().port();
    let egress = |rules: &[&str]| {
        let allow = rules.iter().map(ToString::to_string).collect();
        Some(Egress { allow })
    };
    let connect = async |address: SocketAddr, target: &str| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let asked = format!("CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n");
        stream.write_all(asked.as_bytes()).await.unwrap();
        let mut head = [0; 300];
        let read = timeout(LIMIT, stream.read(&mut head)).await.unwrap();
        String::from_utf8_lossy(&head[..read.unwrap()]).into_owned()
    };
    let node = Node::new().await;
    let open = Open {
        egress: egress(&["127.0.0.1", "127.0.0.2"]),
        ..Open::default()
    };
    let policy = Policy {
        egress: egress(&["127.0.0.1", "127.0.0.3"]),
        ..Policy::default()
    };
    let address = with_policy(&node, open, policy.clone()).await;
    let target = |last: u8| format!("127.0.0.{last}:{port}");
    assert!(
        connect(address, &target(1))
            .await
            .starts_with("HTTP/1.1 200 ")
    );
    let answer = connect(address, &target(2)).await;
    assert!(answer.contains("not in the role's egress"), "{answer}");
    let answer = connect(address, &target(3)).await;
    assert!(answer.contains("not in the job's egress.allow"), "{answer}");

    // What has a network of its own cannot be kept from it.
    node.open("two").await;
    let told = node.grant_with("two", RUN, KEYS, Some(policy));
    let Message::Refused(refused) = told else {
        panic!("{told:?}");
    };
    assert!(
        refused.message.contains("has a network"),
        "{}",
        refused.message
    );
}

#[tokio::test]
async fn a_refused_request_is_on_record() {
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("anthropic", "users")]);
    for path in [
        "/openai/v1/responses",
        "/anthropic/v1/organizations",
        "/anthropic/v1/organizations",
        "/elsewhere",
    ] {
        let sent = Client::new().get(format!("http://{address}{path}"));
        assert!(sent.send().await.unwrap().status().is_client_error());
    }
    assert!(!node.news().await.destinations.is_empty());
    let record = node.close("one").destinations;
    let record: Vec<_> = (record.iter())
        .map(|to| (&*to.host, to.port, to.connections, &*to.denied))
        .collect();
    let broker = |count, words| ("127.0.0.1", 8319, count, words);
    let expected = [
        broker(1, "this run has no key for openai"),
        broker(
            2,
            "`/anthropic/v1/organizations` is not a path of anthropic that a run may use",
        ),
        broker(
            1,
            "`/elsewhere` is not a path of the broker: it must begin with /openai/, /anthropic/ or /google/",
        ),
    ];
    assert_eq!(record, expected);
}

/// A gateway with a certificate that its own authority has signed; returns that too.
async fn gateway() -> (Api, String) {
    let names = vec!["127.0.0.1".to_owned()];
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(names).expect("a certificate");
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).expect("a key");
    let tls = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key);
    (Api::serve(Some(tls.expect("a pair"))).await, cert.pem())
}

/// An HTTP proxy; returns what it was asked for.
async fn proxy() -> (SocketAddr, tokio::sync::mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (asked, told) = tokio::sync::mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(client.read_u8().await.expect("a request"));
            }
            let head = String::from_utf8(head).expect("text");
            let target = head.split(' ').nth(1).expect("a target").to_owned();
            let mut server = TcpStream::connect(&target).await.expect("it listens");
            asked.send(head).await.expect("the test listens");
            let connected = b"HTTP/1.1 200 Connection established\r\n\r\n";
            client.write_all(connected).await.expect("the broker reads");
            tokio::spawn(async move {
                let _broken = copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    (address, told)
}

#[tokio::test]
async fn a_roles_gateway_takes_the_place_of_the_pools() {
    let node = Node::new().await;
    let (gateway, ca) = gateway().await;
    let (proxy, mut asked) = proxy().await;
    let upstream = Upstream {
        provider: "anthropic".into(),
        base_url: format!("https://{}/team", gateway.address),
        ca: ca.into_bytes().into(),
        headers: [("x-team".to_owned(), "research".to_owned())].into(),
        proxy: format!("http://{proxy}"),
    };
    let policy = |upstream: Upstream| Policy {
        upstreams: vec![upstream],
        ..Policy::default()
    };
    let address = with_policy(&node, Open::default(), policy(upstream.clone())).await;
    assert_eq!(prompt(address).await.0, StatusCode::OK);
    let seen = gateway.last();
    assert_eq!(seen.uri, "/team/v1/messages");
    assert_eq!(seen.headers["x-team"], "research");
    assert_eq!(seen.headers["x-api-key"], "users");
    let head = asked.recv().await.expect("it goes through the proxy");
    assert!(
        head.starts_with(&format!("CONNECT {} ", gateway.address)),
        "{head}"
    );
    assert!(
        !head.contains("users") && !head.contains("research"),
        "{head}"
    );
    // The other provider's requests go where the pool sends them.
    let sent = Client::new().post(format!("http://{address}/openai/v1/responses"));
    assert_eq!(sent.send().await.unwrap().status(), StatusCode::OK);
    assert_eq!((node.api.count(), gateway.count()), (1, 1));
    node.close("one");

    // Without its authority, no key goes there.
    let untrusted = Upstream {
        ca: Vec::new().into(),
        ..upstream
    };
    let address = with_policy(&node, Open::default(), policy(untrusted)).await;
    let (status, text) = prompt(address).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert!(text.to_lowercase().contains("certificate"), "{text}");
    assert_eq!(gateway.count(), 1);
    assert_eq!(node.close("one").destinations, Vec::<Destination>::new());
}
