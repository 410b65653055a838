//! Traces of runs in an OpenTelemetry Collector.

use std::{collections::BTreeMap, time::Duration};

use polydev_tests::{
    client::shell, collector::Collector, free_ports, process::succeed, shim::Shim, wait_until,
};
use serde_json::{Value, json};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

#[test]
fn a_trace_of_a_warm_run_has_its_stages_below_the_caller_and_above_the_command() {
    let [port] = free_ports();
    let collector = Collector::start(port);
    let endpoint = format!("--otlp-endpoint=http://127.0.0.1:{port}");
    let shim = Shim::dev_with(&["anthropic=1"], &[&endpoint]);
    let mut run = shim.run_command();
    run.env("TRACEPARENT", format!("00-{TRACE}-{CALLER}-01"));
    run.env("TRACESTATE", "vendor=1");
    let script = "echo $TRACEPARENT $TRACESTATE; exit 3";
    run.args(["anthropic", "--", "sh", "-c", script]);
    let ran = polydev_tests::process::output(&mut run);
    assert_eq!(ran.status.code(), Some(3));
    let told = String::from_utf8(ran.stdout).unwrap();
    let spans = wait_until("the trace", Duration::from_secs(30), || {
        let spans = collector.spans();
        let mut named = spans.iter().map(|span| &span["name"]);
        named
            .any(|name| name == "run")
            .then_some(spans.clone())
            .ok_or(format!("{spans:?}"))
    });
    assert!(
        spans.iter().all(|span| span["traceId"] == TRACE),
        "{spans:?}"
    );
    let by_name: BTreeMap<&str, &Value> = (spans.iter())
        .map(|span| (span["name"].as_str().unwrap(), span))
        .collect();
    let whole = by_name["run"];
    assert_eq!(whole["parentSpanId"], CALLER);
    // In the order in which they are reached; what the command wrote has no fixed place.
    let stages = [
        "received",
        "claimed",
        "granted",
        "limits_raised",
        "started",
        "exited",
    ];
    let mut before = time(whole, "startTimeUnixNano");
    for stage in stages {
        let span = by_name[stage];
        assert_eq!(span["parentSpanId"], whole["spanId"], "{stage}");
        let end = time(span, "endTimeUnixNano");
        assert!(
            time(span, "startTimeUnixNano") >= before.min(end) && end >= before,
            "{stage}"
        );
        before = end;
    }
    assert!(by_name.contains_key("first_output"));
    assert_eq!(time(whole, "endTimeUnixNano"), before);
    let attributes = whole["attributes"].as_array().unwrap();
    for (key, value) in [
        ("polydev.provider", json!({ "stringValue": "anthropic" })),
        ("polydev.run.warm", json!({ "boolValue": true })),
        ("process.exit.code", json!({ "intValue": "3" })),
    ] {
        let attribute = json!({ "key": key, "value": value });
        assert!(attributes.contains(&attribute), "{attributes:?}");
    }

    // The command is below the run.
    let span = whole["spanId"].as_str().unwrap();
    assert_eq!(told, format!("00-{TRACE}-{span}-01 vendor=1\n"));

    // Without a collector nothing is between caller and command.
    let plain = Shim::dev(&["anthropic=1"]);
    let mut run = plain.run_command();
    run.env("TRACEPARENT", format!("00-{TRACE}-{CALLER}-01"));
    let told = succeed(run.args(["anthropic", "--", "sh", "-c", "echo $TRACEPARENT"]));
    assert_eq!(told.trim(), format!("00-{TRACE}-{CALLER}-01"));
    let client = shim.client();
    assert!(client.run(shell("anthropic", "true")).is_ok());
}

fn time(span: &Value, name: &str) -> u64 {
    let time = span[name].as_str().unwrap_or_default();
    time.parse().expect("OTLP has times as text")
}
