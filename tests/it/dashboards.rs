//! The dashboard's queries, over a real Prometheus that fetches metrics from driver and shim.

use std::{fs, process::Command, time::Duration};

use polydev_proto::runtime::{CredentialMode, RunScriptRequest, RunStart};
use polydev_tests::{
    client::{Client, api_key, shell},
    free_ports, fresh_key,
    host::Local,
    nomad::Nomad,
    process::succeed,
    prometheus::Paging,
    root,
    shim::Shim,
    wait_until,
};
use serde_json::Value;

/// Ten scrapes, each with runs between them.
const DATA_TIMEOUT: Duration = Duration::from_secs(120);

/// The expressions of the panels, with their titles.
fn queries() -> Vec<(String, String)> {
    let path = root().join("ops/grafana/dashboards/polydev.json");
    let text = fs::read_to_string(path).expect("the dashboard is there");
    let dashboard: Value = serde_json::from_str(&text).expect("the dashboard is JSON");
    let mut queries = Vec::new();
    for panel in dashboard["panels"].as_array().into_iter().flatten() {
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        for target in targets {
            let title = panel["title"].as_str().unwrap_or_default().to_owned();
            let expression = target["expr"].as_str().expect("a query has an expression");
            // Grafana's own: four times the scrape interval at least.
            queries.push((title, expression.replace("$__rate_interval", "1m")));
        }
    }
    queries
}

/// One run of each kind that the dashboard tells apart.
fn work(client: &Client) {
    for (provider, call) in [("anthropic", "messages"), ("openai", "responses")] {
        client.wait_idle(provider, 1);
        let ask = format!("curl -s -X POST -d '{{}}' http://127.0.0.1:8319/{provider}/v1/{call}");
        let start = RunStart {
            credential: Some(api_key(&fresh_key())),
            credential_mode: CredentialMode::Broker.into(),
            ..shell(provider, &ask)
        };
        let run = client.start(start).expect("the shim takes it");
        client.finish(run).expect("it ends");
    }
    client.wait_idle("python", 1);
    let request = RunScriptRequest {
        user_id: "tester".into(),
        script: "print(1)".into(),
        ..RunScriptRequest::default()
    };
    let result = client.call(async |mut shim| shim.run_script(request).await);
    result.expect("the shim runs it");
    let refused = client.run(shell("nonesuch", "true"));
    assert!(refused.is_err());
}

fn metrics(port: u16) -> String {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--fail", "--noproxy", "*"]);
    succeed(curl.arg(format!("http://127.0.0.1:{port}/metrics")))
}

#[test]
fn every_query_of_the_dashboard_has_data_from_the_metrics_of_driver_and_shim() {
    let [of_driver, of_shim, nobody] = free_ports();
    let listen = format!("telemetry {{\n metrics_listen = \"http://127.0.0.1:{of_driver}\"\n}}");
    let nomad = Nomad::start_with(&listen);
    let model = Local::start();
    nomad.submit_pool_with("anthropic", 1, &format!("base_url={}", model.url));
    // An API that cannot be reached.
    nomad.submit_pool_with("openai", 1, &format!("base_url=http://127.0.0.1:{nobody}"));
    nomad.submit_pool_with("python", 1, "agent=false");
    let listen = format!("--metrics-listen=http://127.0.0.1:{of_shim}");
    let shim = Shim::serve_with(&nomad.address, &[&listen]);
    let client = shim.client();
    let [a, b] = [of_driver, of_shim].map(|port| format!("127.0.0.1:{port}"));
    let paging = Paging::start(&[&a, &b]);

    let mut without = queries();
    assert!(without.len() > 20, "{}", without.len());
    wait_until("data for each query", DATA_TIMEOUT, || {
        work(&client);
        without.retain(|(_, expression)| {
            let values = paging.values(expression).unwrap_or_default();
            // The quantile of no event is not a number.
            !values.iter().any(|value| value.is_finite())
        });
        let figures = || format!("{}\n{}", metrics(of_driver), metrics(of_shim));
        let is_done = without.is_empty().then_some(());
        is_done.ok_or_else(|| format!("{without:?}\n{}", figures()))
    });

    let rules = paging.rules();
    assert!(rules.len() > 10, "{rules:?}");
    assert!(rules.iter().all(|(_, health)| health == "ok"), "{rules:?}");

    let (of_driver, of_shim) = (metrics(of_driver), metrics(of_shim));
    for figures in [of_driver, of_shim] {
        assert!(figures.contains("host_name="), "{figures}");
        assert!(!figures.contains("tester"), "{figures}");
    }
}
