//! Traces of runs in an OpenTelemetry Collector.

use std::{collections::BTreeMap, time::Duration};

use polydev_proto::runtime::RunStart;
use polydev_tests::{
    client::shell, collector::Collector, free_ports, process::succeed, shim::Shim,
    tls::Certificates, wait_until,
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

#[test]
fn traces_and_lines_of_a_run_go_over_grpc_and_over_http_with_tls() {
    let [port] = free_ports();
    let certificates = Certificates::make();
    let collector = Collector::start_with(port, &certificates.collector_settings());
    let ca = format!("--otlp-ca={}", certificates.authority().display());
    let grpc = format!("--otlp-endpoint=https://127.0.0.1:{port}");
    let http = format!(
        "--otlp-endpoint=https://127.0.0.1:{}",
        collector.http_port()
    );
    for options in [
        [&*grpc, "--otlp-protocol=grpc", &ca],
        [&*http, "--otlp-protocol=http/protobuf", &ca],
    ] {
        let shim = Shim::dev_with(&["anthropic=1"], &options);
        let client = shim.client();
        let holder = RunStart {
            stdin: true,
            ..shell("anthropic", "cat")
        };
        let holder = client.start(holder).unwrap();
        // It waits in vain, which is worth a line in the log.
        let run_id = uuid::Uuid::now_v7().to_string();
        let waiting = RunStart {
            run_id: run_id.clone(),
            queue_timeout: Some(prost_types::Duration {
                seconds: 1,
                nanos: 0,
            }),
            ..shell("anthropic", "true")
        };
        let refused = client.run(waiting).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused}");
        let of_run = |records: &[Value], key: &str| {
            let wanted = json!({ "key": key, "value": { "stringValue": run_id } });
            let is_it = |record: &&Value| {
                let attributes = record["attributes"].as_array();
                attributes.is_some_and(|attributes| attributes.contains(&wanted))
            };
            records.iter().find(is_it).cloned()
        };
        let span = wait_until("the trace", Duration::from_secs(30), || {
            let spans = collector.spans();
            of_run(&spans, "polydev.run.id")
                .ok_or_else(|| format!("{spans:?} {}", shim.process.log()))
        });
        let line = wait_until("the line", Duration::from_secs(30), || {
            let lines = collector.lines().into_iter();
            let lines =
                lines.filter(|line| line["body"]["stringValue"] == "the run's relay failed");
            let lines: Vec<_> = lines.collect();
            of_run(&lines, "run_id").ok_or(format!("{lines:?}"))
        });
        for id in ["traceId", "spanId"] {
            assert_eq!(line[id], span[id], "{line}");
        }
        drop(holder);
        wait_until("the metrics", Duration::from_secs(30), || {
            let figures = collector.figures();
            let name = "polydev_shim_nodes";
            figures.contains(name).then_some(()).ok_or(figures)
        });
    }
}
