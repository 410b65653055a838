//! Failures that page somebody, through a real collector, Prometheus and Alertmanager.

use std::time::Duration;

use polydev_proto::runtime::{RunScriptRequest, ScriptStatus};
use polydev_tests::{
    client::Client, collector::Collector, free_ports, nomad::Nomad, prometheus::Paging, shim::Shim,
    wait_until,
};

/// A figure takes a second to the collector, five to Prometheus, five more to the rule, which
/// waits 30 s, and up to ten at Alertmanager.
const PAGE_TIMEOUT: Duration = Duration::from_secs(75);

fn run(client: &Client, text: &str) -> ScriptStatus {
    client.wait_idle("python", 1);
    let request = RunScriptRequest {
        user_id: "tester".into(),
        script: text.into(),
        ..RunScriptRequest::default()
    };
    let result = client.call(async |mut shim| shim.run_script(request).await);
    result.expect("the shim answers").status()
}

#[test]
fn five_scripts_that_fail_in_a_row_page_somebody_and_one_success_resolves_it() {
    let [port] = free_ports();
    let collector = Collector::start(port);
    let paging = Paging::start(&[&collector.address()]);
    let nomad = Nomad::start_with(&format!(
        "telemetry {{\n otlp_endpoint = \"http://127.0.0.1:{port}\"\n interval = \"1s\"\n}}"
    ));
    nomad.submit_pool_with("python", 1, "agent=false");
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    for _ in 0..5 {
        assert_eq!(run(&client, "raise SystemExit(1)"), ScriptStatus::Failure);
    }
    let paged = |status: &str| {
        wait_until("a page", PAGE_TIMEOUT, || {
            let told = paging.told();
            let is_it = told.iter().any(|told| {
                told.name == "SandboxFailureBurst"
                    && (&*told.severity, &*told.status) == ("critical", status)
                    && told.summary.contains("scripts in a row have failed on ")
            });
            is_it
                .then_some(())
                .ok_or_else(|| format!("{told:?}\n{}", collector.figures()))
        });
    };
    paged("firing");
    assert_eq!(run(&client, "print(1)"), ScriptStatus::Success);
    paged("resolved");
}
