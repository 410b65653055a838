//! A container's requests through the broker, to an API of the test's own.

use std::{net::SocketAddr, time::Duration};

use polydev_proto::{
    broker::{Grant, Keys, ModelUsage, Open, Upstream, from_broker::Message},
    sealed::seal_keys,
};
use reqwest::{Client, StatusCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

use crate::node::{FAST, LIMIT, Node, RUN};

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
        ..Grant::default()
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
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("anthropic", "users")]);
    let sent = Client::new().post(format!("http://{address}/anthropic/v1/messages"));
    let answer = sent.header("x-test", "401").send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(answer.headers()["x-should-retry"], "false");
    let seen = node.news().await;
    assert_eq!((&*seen.container, &*seen.run_id), ("one", RUN));
    let refused = seen.refused.expect("the key is refused");
    assert_eq!((&*refused.provider, refused.status), ("anthropic", 401));
}

#[tokio::test]
async fn errors_are_counted_and_an_overload_ends_with_an_answer() {
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("openai", "users")]);
    let ask = async |status: Option<&str>| {
        let mut sent = Client::new().post(format!("http://{address}/openai/v1/responses"));
        if let Some(status) = status {
            sent = sent.header("x-test", status);
        }
        sent.send().await.unwrap();
    };
    ask(Some("429")).await;
    ask(Some("503")).await;
    ask(Some("429")).await;
    let seen = node.news().await;
    let errors: Vec<_> = seen
        .errors
        .iter()
        .map(|error| (error.status, error.count))
        .collect();
    assert_eq!(errors, [(429, 2), (503, 1)]);
    assert!(seen.overloaded_ms.is_some() && seen.refused.is_none());
    ask(None).await;
    assert_eq!(node.news().await.overloaded_ms, None);
    assert_eq!(node.close("one").errors, seen.errors);
}

/// What Anthropic sends in place of an answer that it has promised with status 200.
const OVERLOADED: &str = concat!(
    "event: error\n",
    r#"data: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#,
    "\n\n"
);

#[tokio::test]
async fn an_overload_within_an_answer_does_not_end_the_one_before() {
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("anthropic", "users")]);
    let url = format!("http://{address}/anthropic/v1/messages");
    let busy = Client::new().post(&url).header("x-test", "529");
    busy.send().await.unwrap();
    let before = node.news().await.overloaded_ms.expect("an overload");
    sleep(Duration::from_millis(20)).await;
    let answer = Client::new().post(&url).body(OVERLOADED).send().await;
    let answer = answer.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.text().await.unwrap(), OVERLOADED);
    let seen = node.close("one");
    let errors: Vec<_> = seen
        .errors
        .iter()
        .map(|error| (error.status, error.count))
        .collect();
    assert_eq!(errors, [(529, 2)]);
    assert!(seen.overloaded_ms >= Some(before + 20), "{seen:?}");
}

#[tokio::test]
async fn a_websocket_reports_an_overload_until_it_answers() {
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("openai", "users")]);
    let mut socket = websocket(address).await;
    let failed =
        r#"{"type":"response.failed","response":{"error":{"code":"server_is_overloaded"}}}"#;
    let completed =
        r#"{"type":"response.completed","response":{"model":"m","usage":{"input_tokens":5}}}"#;
    for (text, is_overload) in [(failed, true), (completed, false)] {
        socket.write_all(&frame(1, true, text)).await.unwrap();
        loop {
            let seen = node.news().await;
            if seen.overloaded_ms.is_some() == is_overload {
                break;
            }
        }
    }
    // A later one begins anew.
    sleep(Duration::from_millis(500)).await;
    socket.write_all(&frame(1, true, failed)).await.unwrap();
    let begun = loop {
        if let Some(begun) = node.news().await.overloaded_ms {
            break begun;
        }
    };
    assert!(begun < 500, "{begun}");
    let seen = node.close("one");
    assert_eq!((seen.errors[0].status, seen.errors[0].count), (503, 2));
}

#[tokio::test]
async fn a_websocket_ends_an_overload_too() {
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("openai", "users")]);
    let sent = Client::new().post(format!("http://{address}/openai/v1/responses"));
    sent.header("x-test", "503").send().await.unwrap();
    assert!(node.news().await.overloaded_ms.is_some());
    let _socket = websocket(address).await;
    assert_eq!(node.news().await.overloaded_ms, None);
}

#[tokio::test]
async fn tokens_are_counted_and_the_next_broker_counts_on() {
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("anthropic", "users")]);
    let ask = async |address: SocketAddr| {
        let said = r#"{"model": "claude-x", "usage": {"input_tokens": 7, "output_tokens": 3}}"#;
        let sent = Client::new().post(format!("http://{address}/anthropic/v1/messages"));
        let answer = sent.body(said).send().await.unwrap();
        assert_eq!(answer.text().await.unwrap(), said, "nothing is lost");
    };
    ask(address).await;
    ask(address).await;
    assert_eq!(node.news().await.usage[0].model, "claude-x");
    let held = node.broker.held().remove(0);
    let used = &node.close("one").usage[0];
    let figures = |used: &ModelUsage| (used.requests, used.input_tokens, used.output_tokens);
    assert_eq!(figures(used), (2, 14, 6));

    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    node.broker.open(&held, listener).expect("it is opened");
    ask(address).await;
    assert_eq!(figures(&node.close("one").usage[0]), (3, 21, 9));
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

/// A container's WebSocket, which the API has accepted.
pub(crate) async fn websocket(address: SocketAddr) -> TcpStream {
    let mut socket = TcpStream::connect(address)
        .await
        .expect("the broker listens");
    let request = "GET /openai/v1/responses HTTP/1.1\r\nhost: broker\r\nx-test: websocket\r\n\
                   connection: Upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-extensions: permessage-deflate\r\n\
                   authorization: Bearer placeholder\r\n\r\n";
    let sent = socket.write_all(request.as_bytes()).await;
    sent.expect("the broker reads");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = timeout(LIMIT, socket.read_u8()).await;
        head.push(byte.expect("in time").expect("an answer"));
    }
    let head = String::from_utf8(head).expect("headers are text");
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    socket
}

#[tokio::test]
async fn a_websocket_passes_both_ways_and_breaks_with_its_run() {
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("openai", "users")]);
    let mut socket = websocket(address).await;
    assert_eq!(node.api.last().headers["authorization"], "Bearer users");
    for said in [frame(1, true, "one"), frame(2, true, "two")] {
        socket.write_all(&said).await.unwrap();
        let mut heard = vec![0; said.len()];
        let read = timeout(LIMIT, socket.read_exact(&mut heard)).await;
        read.expect("in time").expect("an echo");
        assert_eq!(heard, said);
    }
    // What is no message could not be counted.
    socket.write_all(b"one").await.unwrap();
    let end = timeout(LIMIT, socket.read_u8()).await.expect("it ends");
    assert!(end.is_err(), "{end:?}");
    let mut socket = websocket(address).await;
    node.broker.close("one");
    let end = timeout(LIMIT, socket.read_u8()).await.expect("it ends");
    assert!(end.is_err(), "{end:?}");
}

/// A server's frame (RFC 6455, section 5.2).
pub(crate) fn frame(opcode: u8, is_last: bool, text: &str) -> Vec<u8> {
    let mut frame = vec![u8::from(is_last) << 7 | opcode];
    match u16::try_from(text.len()).expect("a short text") {
        length @ ..126 => frame.extend(u8::try_from(length)),
        length => {
            frame.push(126);
            frame.extend(length.to_be_bytes());
        }
    }
    frame.extend_from_slice(text.as_bytes());
    frame
}

#[tokio::test]
async fn tokens_of_every_answer_on_a_websocket_are_counted() {
    let node = Node::new().await;
    let address = node.open("one").await;
    node.granted("one", RUN, &[("openai", "users")]);
    let mut socket = websocket(address).await;
    assert!(
        !node
            .api
            .last()
            .headers
            .contains_key("sec-websocket-extensions")
    );
    // Lengths that look like brackets, a message in parts, and a ping between them.
    let delta = format!(r#"{{"type":"d","delta":"{}"}}"#, "x".repeat(100));
    assert_eq!(delta.len(), usize::from(b'{'));
    let completed = r#"{"type":"response.completed","response":{"model":"gpt-x","usage":{"input_tokens":5,"output_tokens":2}}}"#;
    let (first, second) = completed.split_at(70);
    let said = [
        frame(1, true, &delta),
        frame(1, false, first),
        frame(9, true, "{\"[["),
        frame(0, false, second),
        frame(0, true, ""),
        frame(1, true, "{ cut [["),
        frame(1, true, &delta),
        frame(1, true, completed),
    ]
    .concat();
    for piece in said.chunks(7) {
        socket.write_all(piece).await.unwrap();
    }
    let mut heard = vec![0; said.len()];
    let read = timeout(LIMIT, socket.read_exact(&mut heard)).await;
    read.expect("in time").expect("an echo");
    assert_eq!(heard, said);
    let used = &node.close("one").usage[0];
    assert_eq!(used.model, "gpt-x");
    let figures = (used.requests, used.input_tokens, used.output_tokens);
    assert_eq!(figures, (2, 10, 4));
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
            ..Open::default()
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
