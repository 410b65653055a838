//! The metrics of a driver's slots in an OpenTelemetry Collector.

use std::{fs, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use polydev_proto::runtime::{CredentialMode, RunScriptRequest, RunStart, ScriptStatus};
use polydev_tests::{
    client::{api_key, argv, shell},
    collector::Collector,
    docker, free_ports, fresh_key,
    host::Local,
    nomad::Nomad,
    process::succeed,
    shim::{Shim, instance_label},
    wait_until,
};
use serde_json::Value;

const PROVIDER: &str = "provider=\"anthropic\"";
const SLOTS: &str = "polydev_slots";
const STEPS: &str = "polydev_slot_steps_total";
const COUNT: &str = "polydev_slot_state_duration_seconds_count";
/// Tokens that a collector's Prometheus exporter reports.
const TOKENS: &str = "polydev_tokens_total";
const TIMES: &str = "polydev_slot_state_duration_seconds_sum";

/// Asks the model, as a CLI would.
const ASK: &str = "curl -s -X POST -d '{}' http://127.0.0.1:8319/anthropic/v1/messages";

/// Waits until the sum of the series with these labels has this value.
#[track_caller]
fn wait_for(collector: &Collector, name: &str, labels: &[&str], sum: f64) {
    wait_for_more(collector, name, labels, sum, || 0.0);
}

/// The same, and at most once more for each slot that was held: other tests change the machine's
/// firewall. A slot that is held while it is warming is warmed once.
#[track_caller]
fn wait_for_warmed(collector: &Collector, name: &str, labels: &[&str], sum: f64) {
    let held = || collector.sum(STEPS, &[PROVIDER, "cause=\"held\""]);
    wait_for_more(collector, name, labels, sum, held);
}

#[track_caller]
fn wait_for_more(
    collector: &Collector,
    name: &str,
    labels: &[&str],
    sum: f64,
    more: impl Fn() -> f64,
) {
    wait_until("a figure", Duration::from_secs(30), || {
        let (now, most) = (collector.sum(name, labels), sum + more());
        let is_it = (sum - 0.5..most + 0.5).contains(&now);
        is_it.then_some(()).ok_or_else(|| {
            let figures = collector.figures();
            format!("{name} {labels:?} is {now} instead of {sum} to {most}\n{figures}")
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
    let model = Local::start();
    nomad.submit_pool_with("anthropic", 2, &format!("base_url={}", model.url));
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    client.wait_idle("anthropic", 2);
    logged("the collector does not accept metrics");
    let collector = Collector::start(port);
    logged("the collector accepts metrics again");
    wait_for(&collector, SLOTS, &[PROVIDER, "state=\"idle\""], 2.0);
    wait_for_warmed(&collector, STEPS, &[PROVIDER, "cause=\"warmed\""], 2.0);

    let start = RunStart {
        stdin: true,
        credential: Some(api_key(&fresh_key())),
        credential_mode: CredentialMode::Broker.into(),
        ..shell("anthropic", &format!("read line; {ASK}; exit 1"))
    };
    let mut run = client.start(start).unwrap();
    let run_id = run.accepted.run_id.clone();
    wait_for(&collector, SLOTS, &["state=\"claimed\""], 1.0);
    wait_for(&collector, SLOTS, &["state=\"idle\""], 1.0);
    run.close();
    assert_eq!(client.finish(run).unwrap().exited.exit_code, 1);
    client.wait_idle("anthropic", 2);
    wait_for(&collector, SLOTS, &["state=\"claimed\""], 0.0);
    wait_for(&collector, SLOTS, &["state=\"idle\""], 2.0);
    for (cause, count) in [("claimed", 1.0), ("run_ended", 1.0), ("recycled", 1.0)] {
        wait_for(
            &collector,
            STEPS,
            &[PROVIDER, &format!("cause=\"{cause}\"")],
            count,
        );
    }
    wait_for_warmed(&collector, STEPS, &[PROVIDER, "cause=\"warmed\""], 3.0);
    // The stand-in states one token for each side.
    for kind in ["input", "output"] {
        let labels = [PROVIDER, "model=\"stand-in\"", &format!("type=\"{kind}\"")];
        wait_for(&collector, TOKENS, &labels, 1.0);
    }
    let idle = ["state=\"warming\"", "next=\"idle\""];
    wait_for_warmed(&collector, COUNT, &idle, 3.0);
    // The run lasted until the metric, which is sent once a second, had counted it.
    assert!(collector.sum(TIMES, &["state=\"claimed\""]) > 0.1);

    let show = ["pool", "show", "anthropic", "--output", "json"];
    // Another test's change of the firewall may hold a slot, which is then warmed again.
    let mut generations = wait_until("two warmed slots", Duration::from_secs(30), || {
        let shown = succeed(&mut shim.command(&show));
        let slots: Vec<Value> = (shown.lines())
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let is_warmed = |slot: &Value| slot["state"] == "idle" && slot["cause"] == "warmed";
        let generations = slots.iter().map(|slot| slot["generation"].as_u64());
        let generations: Vec<_> = generations.collect();
        (slots.iter().all(is_warmed))
            .then_some(generations)
            .ok_or(shown)
    });
    generations.sort_unstable();
    assert_eq!(generations, [Some(1), Some(2)]);

    // A slot is counted as dead at its first death. A removed slot is in no state.
    let containers = docker::wait_containers(&instance_label(&nomad.state_dir()), 2);
    docker::docker(&["kill", &containers[0]]);
    wait_for(&collector, STEPS, &[PROVIDER, "cause=\"died\""], 1.0);
    nomad.run(&["job", "stop", "-purge", "-detach", "polydev-pool-anthropic"]);
    wait_for(&collector, STEPS, &[PROVIDER, "cause=\"drained\""], 2.0);
    wait_for(&collector, SLOTS, &[], 0.0);

    let figures = collector.figures();
    for secret in ["tester", &run_id, "read line"] {
        assert!(!figures.contains(secret), "{secret} is in {figures}");
    }
}

/// Series about scripts.
const SCRIPTS: &str = "polydev_sandbox_runs_total";
const STREAK: &str = "polydev_sandbox_failure_streak";
const ERRORS: &str = "polydev_sandbox_errors_total";

#[test]
fn failures_of_scripts_in_a_row_are_told_to_a_collector_and_outlive_the_driver() {
    let [port] = free_ports();
    let collector = Collector::start(port);
    let options = format!(
        "telemetry {{\n otlp_endpoint = \"http://127.0.0.1:{port}\"\n interval = \"1s\"\n}}"
    );
    let nomad = Nomad::start_with(&options);
    nomad.submit_pool_with("python", 1, "agent=false");
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    let run = |text: &str, seconds: i64| {
        client.wait_idle("python", 1);
        let timeout = prost_types::Duration { seconds, nanos: 0 };
        let request = RunScriptRequest {
            user_id: "tester".into(),
            script: text.into(),
            timeout: Some(timeout),
            ..RunScriptRequest::default()
        };
        let result = client.call(async |mut shim| shim.run_script(request).await);
        result.unwrap().status()
    };
    for _ in 0..2 {
        assert_eq!(run("raise SystemExit(4)", 60), ScriptStatus::Failure);
    }
    assert_eq!(run("import time; time.sleep(60)", 1), ScriptStatus::Timeout);
    wait_for(&collector, STREAK, &[], 3.0);
    wait_for(&collector, SCRIPTS, &["status=\"timeout\""], 1.0);
    for zero in ["_runs_total{", "_errors_total{"] {
        assert!(
            collector.figures().contains(zero),
            "{}",
            collector.figures()
        );
    }
    let told = |words: &[&str]| {
        wait_until("an event", Duration::from_secs(30), || {
            let log = nomad.agent_log();
            let is_it = |line: &str| {
                line.contains("telemetry.sandbox") && words.iter().all(|word| line.contains(word))
            };
            log.lines().any(is_it).then_some(()).ok_or(log)
        });
    };
    told(&[
        "[INFO]",
        "sandbox execution finished",
        "status=failure",
        "exit_code=4",
        "failure_streak=2",
    ]);
    told(&[
        "[INFO]",
        "status=timeout",
        "timed_out=true",
        "failure_streak=3",
    ]);
    told(&["[WARN]", "overdue_failures=3"]);
    told(&[
        "[ERROR]",
        "sandbox consecutive failure streak exceeded threshold",
        "streak=3",
    ]);

    // The collector has the events, too.
    wait_until("the streak's event", Duration::from_secs(30), || {
        let lines = collector.lines();
        let words = "sandbox consecutive failure streak exceeded threshold";
        let is_it = |line: &&Value| line["body"]["stringValue"] == words;
        let event = lines.iter().find(is_it).ok_or(format!("{lines:?}"))?;
        let streak = serde_json::json!({ "key": "streak", "value": { "intValue": "3" } });
        let attributes = event["attributes"].as_array();
        let has_streak = attributes.is_some_and(|attributes| attributes.contains(&streak));
        has_streak.then_some(()).ok_or(event.to_string())
    });

    let mut start = argv("python", &["/nonesuch"]);
    start.queue_timeout = Some(prost_types::Duration {
        seconds: 30,
        nanos: 0,
    });
    let run_to_its_end = client.finish(client.start(start).unwrap());
    assert_eq!(run_to_its_end.unwrap().exited.exit_code, 127);
    wait_for(&collector, ERRORS, &["reason=\"not_started\""], 1.0);
    told(&[
        "[WARN]",
        "sandbox could not run a script",
        "reason=not_started",
    ]);
    wait_for(&collector, STREAK, &[], 3.0);

    // Everything but the streak is of this life of the driver.
    let lock = fs::read_to_string(nomad.state_dir().join("driver.lock")).unwrap();
    let driver = Pid::from_raw(lock.trim().parse().unwrap());
    kill(driver, Signal::SIGKILL).unwrap();
    wait_for(&collector, SCRIPTS, &[], 0.0);
    wait_for(&collector, STREAK, &[], 3.0);
    assert_eq!(run("print(1)", 60), ScriptStatus::Success);
    wait_for(&collector, STREAK, &[], 0.0);
    wait_for(&collector, SCRIPTS, &["status=\"success\""], 1.0);

    // The node's part of a trace is below the caller's span; this shim adds none.
    let (trace, span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    client.wait_idle("python", 1);
    let mut run = shim.run_command();
    run.env("TRACEPARENT", format!("00-{trace}-{span}-01"));
    succeed(run.args(["python", "--", "true"]));
    let found = wait_until("the node's span", Duration::from_secs(30), || {
        let spans = collector.spans();
        let found = spans.iter().find(|span| span["traceId"] == trace).cloned();
        found.ok_or(format!("{spans:?}"))
    });
    assert_eq!(found["name"], "run on node");
    assert_eq!(found["parentSpanId"], span);
}
