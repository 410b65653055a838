//! How long the agents of the three CLIs wait for a decision about a tool: from the question to the
//! answer, as the agent itself has measured it, in a container with the limits of a run.

use std::{collections::BTreeMap, fs};

use anyhow::ensure;
use polydev_proto::runtime::{RunStart, agent_event::Event};
use polydev_tests::{client::prompt, fresh_key, host::Local, shim::Shim};
use serde_json::{Value, json};

use super::{super::millis, Summary};

/// Calls of one run, and runs. Gemini CLI takes longer for a call.
const CALLS: usize = 10;
const CLIS: [(&str, &str, usize); 3] = [
    ("anthropic", "Claude", 20),
    ("openai", "Codex", 20),
    ("google", "Gemini", 10),
];

pub(super) fn figures(rules: &str) -> anyhow::Result<Vec<Value>> {
    let mut figures = Vec::new();
    for (provider, name, runs) in CLIS {
        figures.push(of(rules, provider, name, runs)?);
    }
    Ok(figures)
}

fn of(rules: &str, provider: &str, name: &str, runs: usize) -> anyhow::Result<Value> {
    let folder = tempfile::tempdir()?;
    let policy = folder.path().join("rules");
    fs::write(&policy, rules)?;
    let model = Local::start();
    let options = [
        format!("--base-url={provider}={}", model.url),
        format!("--egress={provider}="),
        "--agents=true".into(),
        "--tool-policy".into(),
        format!("--policy={}", policy.display()),
    ];
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let shim = Shim::dev_with(&[&format!("{provider}=1")], &options);
    let client = shim.client();
    // A CLI stops a model that makes the same call again and again.
    let commands: Vec<_> = (0..CALLS).map(|call| format!("true {call}")).collect();
    let commands = commands.join(" ;; ");
    let mut samples = Vec::new();
    for _ in 0..runs {
        client.wait_idle(provider, 1);
        let text = format!("Please run: {commands}");
        // The pool knows the model's address, and an agent takes no variables.
        let start = RunStart {
            env: BTreeMap::new(),
            ..prompt(provider, &text, &fresh_key(), "")
        };
        let outcome = client.run(start)?;
        for event in &outcome.agent {
            if let Event::ToolDecision(decision) = event {
                ensure!(decision.allowed, "{decision:?}");
                let waited = decision.waited.unwrap_or_default();
                samples.push(millis(waited.try_into()?));
            }
        }
    }
    let calls = samples.len();
    ensure!(calls == runs * CALLS, "{name}: {calls} calls");
    let waited = Summary::of(&samples);
    Ok(json!({
        "name": format!("{name} waits for a decision about a tool"), "unit": "ms",
        "n": samples.len(), "p50": waited.p50, "p90": waited.p90, "p99": waited.p99,
        "bound": "p99 <= 5 ms", "holds": waited.p99 <= 5.0,
    }))
}
