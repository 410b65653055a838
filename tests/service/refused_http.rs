//! What is refused over HTTP: requests that are wrong, and pages in browsers.

use polydev_tests::fresh_key;
use reqwest::RequestBuilder;
use serde_json::{Value, json};

use crate::caller::{Http, start};

/// Sends what is to be refused: the problem, which has that status and code and, in its message,
/// these words.
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
    invalid(&|start| start["proveder"] = json!("x"), "`start`");
    invalid(&|start| start["provider"] = json!("x"), "`provider`");
    invalid(&|start| start["timeout"] = json!("soon"), "`start.timeout`");
    invalid(&|start| start["stdin"] = json!(true), "`stdin`");
    let follows = json!([{ "path": "a", "size": "5" }]);
    invalid(&|start| start["files"] = follows.clone(), "`files`");
    refused(&http, http.post("/v1/runs", &json!([])), 400, INVALID, "");
    let many = json!({ "start": { "files": vec![json!({}); 100_000] } });
    refused(&http, http.post("/v1/runs", &many), 400, INVALID, "");
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
    invalid("/v1/runs?user_id=a&user_id=b", "`user_id`");
    invalid("/v1/pools/nobody", "`nobody`");
    refused(
        &http,
        http.get("/v1/pool"),
        404,
        "NOT_FOUND",
        "/v1/openapi.json",
    );
    let method = http.post("/v1/pools", &json!({}));
    refused(&http, method, 405, "UNIMPLEMENTED", "");
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
    refused(&http, broken, 400, INVALID, "line 1");
    for (length, most) in [(13 << 20, "12582912"), (5 << 20, "4194304")] {
        let large = json!({ "start": { "prompt": { "text": "x".repeat(length) } } });
        refused(&http, http.post("/v1/runs", &large), 413, INVALID, most);
    }
}

/// Where something is that looks like a secret, it is not said.
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
    // Of another site, or by a name that was made to lead here.
    let pools = || http.get("/v1/pools");
    denied(
        pools().header("origin", "https://example.org"),
        "example.org",
    );
    denied(pools().header("sec-fetch-site", "cross-site"), "");
    denied(pools().header("host", "example.org"), "example.org");
    // What any page may send without being asked, to what is gRPC's.
    for call in ["SubmitJob", "ListPools"] {
        let path = format!("{}/polydev.runtime.v1.RuntimeService/{call}", http.url);
        let request = http.client.post(path).body(vec![0; 5]);
        denied(request.header("content-type", "text/plain"), "/v1/");
    }
}
