//! A caller of a shim over HTTP, without gRPC.

use std::time::Duration;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures_util::StreamExt;
use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::site::{Pools, Site, port};

/// How long the start of an answer may take, and each later piece.
const ANSWER: Duration = Duration::from_secs(60);

pub(crate) struct Http {
    // Dropped before its runtime.
    pub(crate) client: Client,
    runtime: Runtime,
    pub(crate) url: String,
    pub(crate) site: Site,
}

/// A server-sent event.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) id: String,
    pub(crate) data: Value,
}

impl Http {
    pub(crate) fn start(pools: Pools) -> Self {
        // Another test may have installed its provider.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let url = format!("http://127.0.0.1:{}", port());
        let client = Client::builder().no_proxy().build();
        Self {
            client: client.expect("a client can be made"),
            runtime: Runtime::new().expect("a runtime can be made"),
            site: Site::start_with(pools, &["--listen", &url]),
            url,
        }
    }

    pub(crate) fn get(&self, path: &str) -> RequestBuilder {
        self.client.get(format!("{}{path}", self.url))
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.client.post(format!("{}{path}", self.url)).json(body)
    }

    pub(crate) fn send(&self, request: RequestBuilder) -> Response {
        let request = request.timeout(ANSWER);
        let answer = self.runtime.block_on(async { request.send().await });
        answer.expect("an answer")
    }

    /// The status and the JSON of the answer.
    pub(crate) fn ask(&self, request: RequestBuilder) -> (u16, Value) {
        let response = self.send(request);
        let status = response.status().as_u16();
        let body = self.runtime.block_on(response.json());
        (status, body.expect("valid JSON"))
    }

    /// The events of an answer, until `enough` is true.
    pub(crate) fn events(
        &self,
        request: RequestBuilder,
        enough: impl Fn(&Event) -> bool,
    ) -> Vec<Event> {
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

pub(crate) fn is_last(event: &Event) -> bool {
    event.name == "exited"
}

/// The data of the events with this name.
pub(crate) fn text(events: &[Event], name: &str) -> String {
    let named = events.iter().filter(|event| event.name == name);
    let bytes = named.flat_map(|event| {
        let data = event.data["data"].as_str().expect("an event has data");
        BASE64_STANDARD.decode(data).expect("valid base64")
    });
    String::from_utf8(bytes.collect()).expect("valid UTF-8")
}

/// A run whose arguments are steps of the simulated node.
pub(crate) fn start(steps: &[&str]) -> Value {
    json!({
        "provider": "anthropic",
        "user_id": "tester",
        "argv": { "text": steps },
        "timeout": "60s",
    })
}
