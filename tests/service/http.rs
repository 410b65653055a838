//! The shim's service without gRPC: JSON and server-sent events.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tonic::Code;

use crate::caller::{Event, Http, is_last, start, text};

/// The id of the run that the events report.
fn run_id(events: &[Event]) -> String {
    let accepted = events.iter().find(|event| event.name == "accepted");
    let run_id = accepted.and_then(|event| event.data["run_id"].as_str());
    run_id.expect("an accepted run").to_owned()
}

fn events_of(run_id: &str) -> String {
    format!("/v1/runs/{run_id}/events?user_id=tester")
}

#[test]
fn a_run_is_streamed_with_its_files_and_artifacts() {
    let http = Http::start(&[("anthropic", 1)]);
    let steps = [
        "files",
        "err:err\n",
        "lines:50000",
        "artifact:out=hello\n",
        "exit:3",
    ];
    let mut start = start(&steps);
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
    assert_eq!(exited["reason"], "EXIT_REASON_EXITED");
    let artifacts = events
        .iter()
        .find(|event| event.name == "artifacts")
        .unwrap();
    assert_eq!(artifacts.data["files"][0]["path"], "out");
}

#[test]
fn a_run_is_gone_back_to_from_any_event() {
    let http = Http::start(&[("anthropic", 1)]);
    let body = json!({ "start": start(&["lines:50000", "exit:3"]) });
    let events = http.events(http.post("/v1/runs", &body), is_last);
    let path = events_of(&run_id(&events));

    let again = http.events(http.get(&path), is_last);
    assert_eq!(text(&again, "stdout"), text(&events, "stdout"));
    let middle = events.iter().position(|event| event.name == "stdout");
    let (before, after) = events.split_at(middle.unwrap() + 1);
    assert!(!text(after, "stdout").is_empty());
    let id = &before.last().unwrap().id;
    let rest = http.events(http.get(&path).header("last-event-id", id), is_last);
    assert_eq!(text(&rest, "stdout"), text(after, "stdout"));

    // Nothing follows the last event: an `EventSource` stops reconnecting.
    let last = &events.last().unwrap().id;
    let none = http.send(http.get(&path).header("last-event-id", last));
    assert_eq!(none.status(), 204);
}

#[test]
fn runs_are_shown_and_listed_to_their_users() {
    let http = Http::start(&[("anthropic", 1)]);
    let body = json!({ "start": start(&["true"]) });
    let response = http.send(http.post("/v1/runs", &body));
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    drop(response);
    let ended = |shown: &Value| shown["run"]["state"] == "RUN_STATE_ENDED";
    let events = http.events(
        http.get(&format!("{location}/events?user_id=tester")),
        is_last,
    );
    let run_id = run_id(&events);
    assert_eq!(location, format!("/v1/runs/{run_id}"));

    let (status, shown) = http.ask(http.get(&format!("{location}?user_id=tester")));
    assert!(status == 200 && ended(&shown), "{shown}");
    let query = "/v1/runs?user_id=tester&page_size=1&states=RUN_STATE_ENDED,RUN_STATE_RUNNING";
    let (status, listed) = http.ask(http.get(query));
    assert_eq!(
        (status, &listed["runs"][0]["run_id"]),
        (200, &json!(run_id))
    );
    let (status, other) = http.ask(http.get(&format!("{location}?user_id=mallory")));
    assert_eq!(
        (status, &other["error"]["reason"]),
        (403, &json!("OTHER_USER"))
    );
}

#[test]
fn a_job_is_submitted_and_cancelled() {
    let http = Http::start(&[("anthropic", 1)]);
    let job = json!({ "start": start(&["out:begun\n", "wait"]) });
    let (status, submitted) = http.ask(http.post("/v1/runs?detach=true", &job));
    assert_eq!(status, 200, "{submitted}");
    let run_id = submitted["accepted"]["run_id"].as_str().unwrap();
    let cancel = format!("/v1/runs/{run_id}/cancel");
    let user = json!({ "user_id": "tester" });
    assert_eq!(http.ask(http.post(&cancel, &user)), (200, json!({})));
    let events = http.events(http.get(&events_of(run_id)), is_last);
    assert_eq!(text(&events, "stdout"), "begun\n");
    let reason = &events.last().unwrap().data["reason"];
    assert_eq!(*reason, "EXIT_REASON_CANCELLED");
    let named = json!({ "user_id": "tester", "run_id": uuid::Uuid::now_v7().to_string() });
    let (status, problem) = http.ask(http.post(&cancel, &named));
    assert_eq!(
        (status, &problem["error"]["code"]),
        (400, &json!("INVALID_ARGUMENT"))
    );
}

#[test]
fn leases_pools_and_nodes_are_had_without_grpc() {
    let http = Http::start(&[("anthropic", 1)]);
    let user = json!({ "user_id": "tester" });
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
    http.site.shim.client().wait_idle("anthropic", 1);
    let (status, problem) = http.ask(http.post(&release, &user));
    assert_eq!(
        (status, &problem["error"]["reason"]),
        (404, &json!("NO_LEASE"))
    );

    let (_, pools) = http.ask(http.get("/v1/pools"));
    assert_eq!(pools["pools"].as_array().unwrap().len(), 4);
    let (_, status) = http.ask(http.get("/v1/status"));
    assert_eq!(status["nodes"][0]["reachable"], true);
    assert_eq!(status["nodes"][0]["node_id"], http.site.node().id());
}

/// An error before the first event sets the HTTP status; a later error is an event.
#[test]
fn an_error_is_a_status_before_the_first_event_and_an_event_after_it() {
    let http = Http::start(&[("anthropic", 1)]);
    let body = json!({ "start": start(&["out:begun\n", "wait"]) });
    let is_output = |event: &Event| event.name == "stdout";
    let events = http.events(http.post("/v1/runs", &body), is_output);
    let run_id = run_id(&events);
    let mut full = body.clone();
    full["start"]["queue_timeout"] = json!("0s");
    let (status, problem) = http.ask(http.post("/v1/runs?detach=true", &full));
    assert_eq!(
        (status, &problem["error"]["reason"]),
        (429, &json!("NO_IDLE_SLOT"))
    );
    assert_eq!(problem["error"]["retry_after_seconds"], 1);

    let is_problem = |event: &Event| {
        if is_output(event) {
            // The attach below has sent its first events. Now the node loses the run.
            http.site.node().forget(&run_id);
            http.site.node().break_connections();
        }
        event.name == "problem"
    };
    let events = http.events(http.get(&events_of(&run_id)), is_problem);
    let error = &events.last().unwrap().data["error"];
    assert_eq!(
        (&error["code"], &error["reason"]),
        (&json!("ABORTED"), &json!("CONNECTION_LOST"))
    );
}

/// As `google.rpc.Code` maps them to HTTP.
#[test]
fn a_nodes_refusal_has_the_status_of_its_code() {
    for (code, status, reason) in [
        (Code::InvalidArgument, 400, "REFUSED"),
        (Code::AlreadyExists, 409, "OTHER_COMMAND"),
    ] {
        let http = Http::start(&[("anthropic", 1)]);
        http.site.node().refuse(code, "not this one");
        let body = json!({ "start": start(&["true"]) });
        let (told, problem) = http.ask(http.post("/v1/runs", &body));
        assert_eq!(
            (told, &problem["error"]["reason"]),
            (status, &json!(reason))
        );
        let message = problem["error"]["message"].as_str().unwrap();
        assert!(message.contains("not this one"), "{message}");
    }
}
