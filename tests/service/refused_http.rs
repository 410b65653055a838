//! What the shim refuses over HTTP: wrong requests, and requests of web pages in browsers.

use polydev_tests::fresh_key;
use reqwest::RequestBuilder;
use serde_json::{Value, json};

use crate::caller::{Http, start};

/// Sends a request that the shim must refuse with this status and code. The message must contain
/// these words. Returns the problem.
#[track_caller]
fn refused(http: &Http, request: RequestBuilder, status: u16, code: &str, words: &str) -> String {
    let (told, problem) = http.ask(request);
    let message = problem["error"]["message"].as_str();
    let message = message.expect("a problem has words");
    let is_so = told == status && problem["error"]["code"] == code && message.contains(words);
    assert!(is_so, "{told} {problem}, not {status} {code} `{words}`");
    problem.to_string()
}

fn changed(http: &Http, change: impl FnOnce(&mut Value)) -> RequestBuilder {
    let mut start = start(&["true"]);
    change(&mut start);
    http.post("/v1/runs", &json!({ "start": start }))
}

const INVALID: &str = "INVALID_ARGUMENT";

#[test]
fn a_start_that_is_wrong_is_refused_with_its_place() {
    let http = Http::start(&[("anthropic", 1)]);
    let invalid = |change: &dyn Fn(&mut Value), words: &str| {
        refused(&http, changed(&http, change), 400, INVALID, words);
    };
    let unknown = "`start` is not valid (unknown field or wrong value)";
    invalid(&|start| start["proveder"] = json!("x"), unknown);
    invalid(&|start| start["provider"] = json!("x"), "`provider` is `x`");
    invalid(&|start| start["timeout"] = json!("soon"), "`start.timeout`");
    invalid(&|start| start["stdin"] = json!(true), "`stdin`");
    let follows = json!([{ "path": "a", "size": "5" }]);
    invalid(&|start| start["files"] = follows.clone(), "`files`");
    let many = json!({ "start": { "files": vec![json!({}); 100_000] } });
    for body in [json!([]), many] {
        let request = http.post("/v1/runs", &body);
        refused(&http, request, 400, INVALID, "is not valid");
    }
    let detach = http.post("/v1/runs?detach=maybe", &json!({}));
    refused(&http, detach, 400, INVALID, "detach");
    assert!(http.site.node().asked().claims.is_empty());
}

#[test]
fn a_path_or_a_query_that_is_wrong_is_refused() {
    let http = Http::start(&[]);
    let invalid = |path: &str, words: &str| {
        refused(&http, http.get(path), 400, INVALID, words);
    };
    invalid("/v1/runs/42?user_id=tester", "`run_id` is `42`");
    invalid("/v1/runs/%FF?user_id=tester", "UTF-8");
    invalid("/v1/runs/42", "user_id");
    invalid("/v1/runs?states=RUN_STATE_DONE", "`states[0]`");
    let twice = "`user_id` is given more than once";
    invalid("/v1/runs?user_id=a&user_id=b", twice);
    invalid("/v1/pools/nobody", "`nobody`");
    refused(
        &http,
        http.get("/v1/pool"),
        404,
        "NOT_FOUND",
        "/v1/openapi.json",
    );
    let method = http.post("/v1/pools", &json!({}));
    refused(
        &http,
        method,
        405,
        "UNIMPLEMENTED",
        "does not support this method",
    );
    let run_id = uuid::Uuid::now_v7();
    let path = format!("/v1/runs/{run_id}/events?user_id=tester");
    refused(
        &http,
        http.get(&path),
        404,
        "NOT_FOUND",
        &run_id.to_string(),
    );
    let wrong = http.get(&path).header("last-event-id", "1.2");
    refused(&http, wrong, 400, INVALID, "`Last-Event-ID`");
}

#[test]
fn a_body_that_is_no_json_or_too_long_is_refused() {
    let http = Http::start(&[]);
    let post = || http.client.post(format!("{}/v1/runs", http.url));
    refused(&http, post().body("{}"), 415, INVALID, "`Content-Type`");
    let broken = post().body("{").header("content-type", "application/json");
    let place = "not valid JSON, at line 1, column 1";
    refused(&http, broken, 400, INVALID, place);
    for (length, most) in [
        (13 << 20, "more than 12582912 bytes"),
        (5 << 20, "bytes; must be at most 4194304"),
    ] {
        let large = json!({ "start": { "prompt": { "text": "x".repeat(length) } } });
        refused(&http, http.post("/v1/runs", &large), 413, INVALID, most);
    }
}

/// An error does not quote a value that looks like a secret.
#[test]
fn nothing_is_quoted_of_a_credential_that_is_wrong() {
    let http = Http::start(&[]);
    let key = fresh_key();
    for credential in [
        json!({ "secret": key }),
        json!({ "secret": { "api_key": key } }),
        json!({ "secret": { "environment": { &key: 1 } } }),
    ] {
        let request = changed(&http, |start| start["credential"] = credential);
        let told = refused(&http, request, 400, INVALID, "`start.credential");
        assert!(!told.contains(&key), "{told}");
    }
}

#[test]
fn pages_in_browsers_are_kept_away() {
    let http = Http::start(&[]);
    let denied = |request: RequestBuilder, words: &str| {
        refused(&http, request, 403, "PERMISSION_DENIED", words);
    };
    // Requests of another site, and requests to a DNS name that was pointed at this machine.
    let pools = || http.get("/v1/pools");
    denied(
        pools().header("origin", "https://example.org"),
        "example.org",
    );
    denied(pools().header("sec-fetch-site", "cross-site"), "pages");
    denied(pools().header("host", "example.org"), "example.org");
    // Requests to gRPC's paths that any web page may send without a preflight.
    for call in ["SubmitJob", "ListPools"] {
        let path = format!("{}/polydev.runtime.v1.RuntimeService/{call}", http.url);
        let request = http.client.post(path).body(vec![0; 5]);
        let request = request.header("content-type", "text/plain");
        denied(request, "over HTTP/1 only paths below /v1/ are served");
    }
}
