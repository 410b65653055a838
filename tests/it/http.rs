//! The shim's service without gRPC: JSON and server-sent events.

use std::{process::Command, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures_util::StreamExt;
use polydev_tests::{free_ports, fresh_key, process::output, root, shim::Shim, wait_until};
use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

/// A caller of a shim over HTTP.
struct Http {
    // Before the runtime that it is used in.
    client: Client,
    runtime: Runtime,
    url: String,
    shim: Shim,
}

/// A server-sent event.
#[derive(Debug)]
struct Event {
    name: String,
    id: String,
    data: Value,
}

impl Http {
    fn start() -> Self {
        // One of another test may be installed.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let [port] = free_ports();
        let url = format!("http://127.0.0.1:{port}");
        Self {
            client: Client::new(),
            runtime: Runtime::new().expect("a runtime can be made"),
            shim: Shim::dev_with(&["anthropic=1"], &["--listen", &url]),
            url,
        }
    }

    fn get(&self, path: &str) -> RequestBuilder {
        self.client.get(format!("{}{path}", self.url))
    }

    fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.client.post(format!("{}{path}", self.url)).json(body)
    }

    fn send(&self, request: RequestBuilder) -> Response {
        let request = request.timeout(Duration::from_secs(60));
        let answer = self.runtime.block_on(async { request.send().await });
        answer.expect("an answer")
    }

    /// The answer's status and JSON.
    fn ask(&self, request: RequestBuilder) -> (u16, Value) {
        let response = self.send(request);
        let status = response.status().as_u16();
        let body = self.runtime.block_on(response.json());
        (status, body.expect("it is JSON"))
    }

    /// The events of an answer, until `enough`.
    fn events(&self, request: RequestBuilder, enough: impl Fn(&Event) -> bool) -> Vec<Event> {
        let response = self.send(request);
        assert_eq!(response.status(), 200);
        let mut bytes = response.bytes_stream();
        let (mut text, mut events) = (String::new(), Vec::new());
        self.runtime.block_on(async {
            loop {
                while let Some(end) = text.find("\n\n") {
                    let event = parse(&text[..end]);
                    text.drain(..end + 2);
                    let is_enough = enough(&event);
                    events.push(event);
                    if is_enough {
                        return;
                    }
                }
                let piece = bytes.next().await.expect("more events").expect("a piece");
                text.push_str(&String::from_utf8_lossy(&piece));
            }
        });
        events
    }
}

fn parse(text: &str) -> Event {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().trim().to_owned()
    };
    Event {
        name: field("event:"),
        id: field("id:"),
        data: serde_json::from_str(&field("data:")).expect("its data is JSON"),
    }
}

fn is_last(event: &Event) -> bool {
    event.name == "exited"
}

fn text(events: &[Event], name: &str) -> String {
    let named = events.iter().filter(|event| event.name == name);
    let bytes = named.flat_map(|event| {
        let data = event.data["data"].as_str().expect("it has data");
        BASE64_STANDARD.decode(data).expect("it is base64")
    });
    String::from_utf8(bytes.collect()).expect("it is text")
}

fn shell(script: &str) -> Value {
    json!({
        "provider": "anthropic",
        "user_id": "tester",
        "argv": { "text": ["sh", "-c", script] },
        "timeout": "60s",
    })
}

#[test]
fn a_run_is_streamed_and_gone_back_to_without_grpc() {
    let http = Http::start();
    let mut start = shell("cat in; echo err >&2; seq 1 50000; cp in out; exit 3");
    start["files"] = json!([{ "path": "in", "content": BASE64_STANDARD.encode("hello\n") }]);
    start["artifacts"] = json!({ "patterns": ["out"] });
    let events = http.events(http.post("/v1/runs", &json!({ "start": start })), is_last);
    let lines: String = (1..=50_000).map(|line| format!("{line}\n")).collect();
    assert!(text(&events, "stdout") == format!("hello\n{lines}"));
    assert_eq!(text(&events, "stderr"), "err\n");
    assert_eq!(text(&events, "artifact_data"), "hello\n");
    let exited = &events.last().unwrap().data;
    assert_eq!(
        (&exited["exit_code"], &exited["artifact_bytes"]),
        (&json!(3), &json!("6"))
    );
    let accepted = events
        .iter()
        .find(|event| event.name == "accepted")
        .unwrap();
    let run_id = accepted.data["run_id"].as_str().unwrap();

    // From the beginning, and from after an event.
    let path = format!("/v1/runs/{run_id}/events?user_id=tester");
    let again = http.events(http.get(&path), is_last);
    assert_eq!(text(&again, "stdout"), text(&events, "stdout"));
    let middle = events
        .iter()
        .position(|event| event.name == "stdout")
        .unwrap();
    let (before, after) = events.split_at(middle + 1);
    let rest = http.get(&path).header("last-event-id", &before[middle].id);
    let rest = http.events(rest, is_last);
    assert_eq!(text(&rest, "stdout"), text(after, "stdout"));

    // After the last there is nothing: an `EventSource` stops coming back.
    let last = &events.last().unwrap().id;
    let none = http.send(http.get(&path).header("last-event-id", last));
    assert_eq!(none.status(), 204);

    let (status, shown) = http.ask(http.get(&format!("/v1/runs/{run_id}?user_id=tester")));
    assert_eq!(
        (status, &shown["run"]["state"]),
        (200, &json!("RUN_STATE_ENDED"))
    );
    let (status, listed) =
        http.ask(http.get("/v1/runs?user_id=tester&page_size=1&states=RUN_STATE_ENDED"));
    assert_eq!(
        (status, &listed["runs"][0]["run_id"]),
        (200, &json!(run_id))
    );
    let (status, other) = http.ask(http.get(&format!("/v1/runs/{run_id}?user_id=mallory")));
    assert_eq!(
        (status, &other["error"]["reason"]),
        (403, &json!("OTHER_USER"))
    );
}

#[test]
fn jobs_leases_and_pools_are_had_without_grpc() {
    let http = Http::start();
    let grpc = http.shim.client();
    let job = json!({ "start": shell("echo begun; sleep 1000") });
    let (status, submitted) = http.ask(http.post("/v1/runs?detach=true", &job));
    assert_eq!(status, 200, "{submitted}");
    let run_id = submitted["accepted"]["run_id"].as_str().unwrap();
    let cancel = format!("/v1/runs/{run_id}/cancel");
    let user = json!({ "user_id": "tester" });
    assert_eq!(http.ask(http.post(&cancel, &user)), (200, json!({})));
    let path = format!("/v1/runs/{run_id}/events?user_id=tester");
    let events = http.events(http.get(&path), is_last);
    let reason = &events.last().unwrap().data["reason"];
    assert_eq!(*reason, "EXIT_REASON_CANCELLED");

    grpc.wait_idle("anthropic", 1);
    let wanted = json!({ "provider": "anthropic", "user_id": "tester", "time": "300s" });
    let (status, allocated) = http.ask(http.post("/v1/leases", &wanted));
    assert_eq!(status, 200, "{allocated}");
    let lease_id = allocated["lease"]["lease_id"].as_str().unwrap();
    let (_, pool) = http.ask(http.get("/v1/pools/anthropic"));
    assert_eq!(
        (&pool["pool"]["leased"], &pool["slots"][0]["run_id"]),
        (&json!(1), &json!(lease_id))
    );
    let none = json!({ "provider": "anthropic", "user_id": "tester", "queue_timeout": "0s" });
    let full = http.send(http.post("/v1/leases", &none));
    assert_eq!(
        (full.status().as_u16(), &full.headers()["retry-after"]),
        (429, &"1".parse().unwrap())
    );
    let release = format!("/v1/leases/{lease_id}/release");
    assert_eq!(http.ask(http.post(&release, &user)), (200, json!({})));
    assert_eq!(http.ask(http.post(&release, &user)).0, 404);

    let (_, pools) = http.ask(http.get("/v1/pools"));
    assert_eq!(pools["pools"].as_array().unwrap().len(), 3);
    let (_, status) = http.ask(http.get("/v1/status"));
    assert_eq!(status["nodes"][0]["reachable"], true);
}

#[test]
fn what_is_not_understood_is_refused_over_http_too() {
    let http = Http::start();
    let refused = |request: RequestBuilder, status: u16, words: &str| {
        let (told, problem) = http.ask(request);
        let message = problem["error"]["message"].as_str().unwrap();
        assert!(
            told == status && message.contains(words),
            "{told} {problem}"
        );
        problem.to_string()
    };
    let start = |change: &dyn Fn(&mut Value)| {
        let mut start = shell("true");
        change(&mut start);
        http.post("/v1/runs", &json!({ "start": start }))
    };
    refused(
        start(&|start| start["proveder"] = json!("x")),
        400,
        "`start` is not understood",
    );
    refused(
        start(&|start| start["provider"] = json!("x")),
        400,
        "`provider` is `x`",
    );
    refused(
        start(&|start| start["timeout"] = json!("soon")),
        400,
        "`start.timeout`",
    );
    refused(start(&|start| start["stdin"] = json!(true)), 400, "`stdin`");
    let follows = json!([{ "path": "a", "size": "5" }]);
    refused(
        start(&|start| start["files"] = follows.clone()),
        400,
        "`files`",
    );
    refused(http.post("/v1/runs", &json!([])), 400, "not understood");
    refused(
        http.post("/v1/runs?detach=maybe", &json!({})),
        400,
        "detach",
    );
    refused(
        http.get("/v1/runs/42?user_id=tester"),
        400,
        "`run_id` is `42`",
    );
    refused(http.get("/v1/runs/%FF?user_id=tester"), 400, "UTF-8");
    refused(http.get("/v1/runs/42"), 400, "user_id");
    refused(
        http.get("/v1/runs?states=RUN_STATE_DONE"),
        400,
        "`states[0]`",
    );
    refused(
        http.get("/v1/runs?user_id=a&user_id=b"),
        400,
        "`user_id` comes more than once",
    );
    refused(http.get("/v1/pools/nobody"), 400, "`nobody`");
    refused(http.get("/v1/pool"), 404, "/v1/openapi.json");
    refused(http.post("/v1/pools", &json!({})), 405, "no such method");
    let text = http.client.post(format!("{}/v1/runs", http.url)).body("{}");
    refused(text, 415, "`Content-Type`");
    let broken = http.client.post(format!("{}/v1/runs", http.url)).body("{");
    let broken = broken.header("content-type", "application/json");
    refused(broken, 400, "no JSON from line 1, column 1 on");
    let large = json!({ "start": { "prompt": { "text": "x".repeat(13 << 20) } } });
    refused(http.post("/v1/runs", &large), 413, "bytes");
    let large = json!({ "start": { "prompt": { "text": "x".repeat(5 << 20) } } });
    refused(http.post("/v1/runs", &large), 413, "bytes");
    let many = json!({ "start": { "files": vec![json!({}); 100_000] } });
    refused(http.post("/v1/runs", &many), 400, "not understood");
    let run_id = uuid::Uuid::now_v7();
    let path = format!("/v1/runs/{run_id}/events?user_id=tester");
    refused(http.get(&path), 404, &run_id.to_string());
    refused(
        http.get(&path).header("last-event-id", "1.2"),
        400,
        "`Last-Event-ID`",
    );

    // Where something is that looks like a secret, it is not said.
    let key = fresh_key();
    for credential in [
        json!({ "secret": key }),
        json!({ "secret": { "api_key": key } }),
        json!({ "secret": { "environment": { &key: 1 } } }),
    ] {
        let request = start(&|start| start["credential"] = credential.clone());
        let told = refused(request, 400, "`start.credential");
        assert!(!told.contains(&key), "{told}");
    }
}

#[test]
fn pages_in_browsers_are_kept_away() {
    let http = Http::start();
    let denied = |request: RequestBuilder, words: &str| {
        let (status, problem) = http.ask(request);
        let message = problem["error"]["message"].as_str().unwrap();
        assert!(
            status == 403 && message.contains(words),
            "{status} {problem}"
        );
    };
    // Of another site, or by a name that was made to lead here.
    denied(
        http.get("/v1/pools")
            .header("origin", "https://example.org"),
        "example.org",
    );
    denied(
        http.get("/v1/pools").header("sec-fetch-site", "cross-site"),
        "pages",
    );
    denied(
        http.get("/v1/pools").header("host", "example.org"),
        "example.org",
    );
    // What any page may send without being asked, to what is gRPC's.
    for call in ["SubmitJob", "ListPools"] {
        let path = format!("{}/polydev.runtime.v1.RuntimeService/{call}", http.url);
        let request = http.client.post(path).body(vec![0; 5]);
        denied(request.header("content-type", "text/plain"), "over HTTP/1");
    }
}

/// Schemathesis makes requests of what the document says, right and wrong ones, and holds the
/// answers against it.
#[test]
fn what_is_served_is_what_the_openapi_document_says() {
    let http = Http::start();
    let (_, document) = http.ask(http.get("/v1/openapi.json"));
    assert_eq!(document["openapi"], "3.1.0");
    let found = output(&mut Command::new(root().join("tests/python.sh")));
    assert!(
        found.status.success(),
        "{}",
        String::from_utf8_lossy(&found.stderr)
    );
    let folder = String::from_utf8(found.stdout).unwrap();
    let mut checking = Command::new(format!("{}/schemathesis", folder.trim()));
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";
    checking
        .args(["run", &format!("{}/v1/openapi.json", http.url)])
        .args(["--checks", checks, "--phases", "coverage,fuzzing"])
        .args([
            "--max-examples",
            "50",
            "--seed",
            "1",
            "--request-timeout",
            "15",
        ])
        .current_dir(http.shim.state_dir());
    let checked = output(&mut checking);
    let words = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success(), "{words}");
    // It still serves.
    wait_until("an idle slot", Duration::from_secs(90), || {
        let (_, pool) = http.ask(http.get("/v1/pools/anthropic"));
        match pool["pool"]["idle"].as_u64() {
            Some(1) => Ok(()),
            _ => Err(pool.to_string()),
        }
    });
}
