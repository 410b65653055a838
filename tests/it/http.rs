//! The shim's service without gRPC: JSON and server-sent events.

use std::{process::Command, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures_util::StreamExt;
use polydev_tests::{free_ports, process::output, root, shim::Shim, wait_until};
use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

/// A caller of a shim over HTTP.
struct Http {
    // Dropped before its runtime.
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
        // Another test may have installed its provider.
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

    /// The status and the JSON of the answer.
    fn ask(&self, request: RequestBuilder) -> (u16, Value) {
        let response = self.send(request);
        let status = response.status().as_u16();
        let body = self.runtime.block_on(response.json());
        (status, body.expect("valid JSON"))
    }

    /// The events of an answer, until `enough` is true.
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
        let data = event.data["data"].as_str().expect("an event has data");
        BASE64_STANDARD.decode(data).expect("valid base64")
    });
    String::from_utf8(bytes.collect()).expect("valid UTF-8")
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

    // From the start, and from after an event.
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

    // Nothing follows the last event: an `EventSource` stops reconnecting.
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
    // The shim still serves.
    wait_until("an idle slot", Duration::from_secs(90), || {
        let (_, pool) = http.ask(http.get("/v1/pools/anthropic"));
        match pool["pool"]["idle"].as_u64() {
            Some(1) => Ok(()),
            _ => Err(pool.to_string()),
        }
    });
}
