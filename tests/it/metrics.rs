//! What a driver tells an OpenTelemetry Collector of its slots.

use std::time::Duration;

use polydev_proto::runtime::RunStart;
use polydev_tests::{
    client::shell, collector::Collector, free_ports, nomad::Nomad, process::succeed, shim::Shim,
    wait_until,
};
use serde_json::Value;

const SLOTS: &str = "polydev_slots";
const STEPS: &str = "polydev_slot_state_duration_seconds_count";
const TIMES: &str = "polydev_slot_state_duration_seconds_sum";

/// Waits until the series with these labels come to that.
#[track_caller]
fn wait_for(collector: &Collector, name: &str, labels: &[&str], sum: f64) {
    wait_until("a figure", Duration::from_secs(30), || {
        let now = collector.sum(name, labels);
        let is_it = (now - sum).abs() < 0.5;
        is_it.then_some(()).ok_or_else(|| {
            let figures = collector.figures();
            format!("{name} {labels:?} is {now} instead of {sum}\n{figures}")
        })
    });
}

#[test]
fn slots_their_states_and_every_step_with_its_cause_are_told_to_a_collector() {
    let [port] = free_ports();
    let options = format!(
        "telemetry {{\n otlp_endpoint = \"http://127.0.0.1:{port}\"\n interval = \"1s\"\n}}"
    );
    let nomad = Nomad::start_with(&options);
    let logged = |what: &str| {
        wait_until(what, Duration::from_secs(30), || {
            let log = nomad.agent_log();
            log.contains(what).then_some(()).ok_or(log)
        });
    };
    nomad.submit_pool("anthropic", 2);
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    client.wait_idle("anthropic", 2);
    logged("the collector takes no metrics");
    let collector = Collector::start(port);
    logged("the collector takes metrics again");
    let provider = "provider=\"anthropic\"";
    wait_for(&collector, SLOTS, &[provider, "state=\"idle\""], 2.0);
    let warmed = ["state=\"warming\"", "next=\"idle\"", "cause=\"warmed\""];
    wait_for(&collector, STEPS, &warmed, 2.0);

    let start = RunStart {
        stdin: true,
        ..shell("anthropic", "read line")
    };
    let mut run = client.start(start).unwrap();
    wait_for(&collector, SLOTS, &["state=\"claimed\""], 1.0);
    wait_for(&collector, SLOTS, &["state=\"idle\""], 1.0);
    run.close();
    assert_eq!(client.finish(run).unwrap().exited.exit_code, 1);
    client.wait_idle("anthropic", 2);
    wait_for(&collector, SLOTS, &["state=\"claimed\""], 0.0);
    wait_for(&collector, SLOTS, &["state=\"idle\""], 2.0);
    wait_for(&collector, STEPS, &warmed, 3.0);
    for step in [
        ["state=\"idle\"", "next=\"claimed\"", "cause=\"claimed\""],
        [
            "state=\"claimed\"",
            "next=\"recycling\"",
            "cause=\"run_ended\"",
        ],
        [
            "state=\"recycling\"",
            "next=\"warming\"",
            "cause=\"recycled\"",
        ],
    ] {
        wait_for(
            &collector,
            STEPS,
            &[provider, step[0], step[1], step[2]],
            1.0,
        );
    }
    // The run was there until a figure that comes once a second had told so.
    assert!(collector.sum(TIMES, &["state=\"claimed\""]) > 0.1);
    assert!(
        !collector.figures().contains("tester"),
        "who ran is no figure"
    );

    let shown = succeed(&mut shim.command(&["pool", "show", "anthropic", "--output", "json"]));
    let shown: Value = serde_json::from_str(shown.lines().nth(1).unwrap_or_default()).unwrap();
    assert_eq!(
        (&shown["state"], &shown["cause"]),
        (&"idle".into(), &"warmed".into())
    );
}
