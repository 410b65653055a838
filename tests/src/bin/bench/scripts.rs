//! A script with one plot, in three ways in turn: in a Python that waits, in a Python that is
//! started in a warm container, and by `docker run`. All have the limits of a script. Measured from
//! the caller's request until it has the PNG.

use std::{fs, os::unix::fs::chown, time::Instant};

use anyhow::ensure;
use polydev_proto::runtime::{
    ExpectedOutput, RunScriptRequest, ScriptStatus, script_output::Content, started,
};
use polydev_tests::{client::Client, docker, process::output, shim::Shim};
use serde_json::{Value, json};

use super::{Summary, millis};

const SAMPLES: usize = 30;
const SCRIPT: &str = "\
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

x = np.linspace(0, 6, 200)
frame = pd.DataFrame({'x': x, 'y': np.sin(x)})
figure, axes = plt.subplots()
axes.plot(frame['x'], frame['y'])
figure.savefig('plot.png')
";
const PNG: &[u8] = b"\x89PNG";

pub(super) fn figures() -> anyhow::Result<Vec<Value>> {
    let with = Shim::dev_with(&["python=1"], &["--agents=true"]);
    let without = Shim::dev(&["python=1"]);
    let (waiting, starting) = (with.client(), without.client());
    let (mut parked, mut cold, mut by_docker) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..SAMPLES {
        for client in [&waiting, &starting] {
            client.wait_idle("python", 1);
        }
        parked.push(by_shim(&waiting, started::Agent::Parked)?);
        waiting.wait_idle("python", 1);
        cold.push(by_shim(&starting, started::Agent::Unspecified)?);
        starting.wait_idle("python", 1);
        by_docker.push(docker_run()?);
    }
    let [parked, cold, by_docker] = [parked, cold, by_docker].map(|all| Summary::of(&all));
    let figure = |other: &Summary, name: &str, most: f64| {
        let ratio = parked.p50 / other.p50;
        json!({
            "name": "script parked, to the PNG", "unit": "ms", "n": SAMPLES,
            "p50": parked.p50, "p90": parked.p90, "p99": parked.p99,
            "against": {
                "name": name, "unit": "ms", "n": SAMPLES,
                "p50": other.p50, "p90": other.p90, "p99": other.p99,
            },
            "ratio": ratio, "bound": format!("ratio <= {most}"), "holds": ratio <= most,
        })
    };
    Ok(vec![
        figure(&cold, "script cold in a warm container", 0.4),
        figure(&by_docker, "script by `docker run`", 0.25),
    ])
}

fn by_shim(client: &Client, form: started::Agent) -> anyhow::Result<f64> {
    let clock = Instant::now();
    let request = RunScriptRequest {
        user_id: "bench".into(),
        script: SCRIPT.into(),
        expected_outputs: vec![ExpectedOutput {
            path: "plot.png".into(),
            kind: 0,
        }],
        ..RunScriptRequest::default()
    };
    let result = client.call(async |mut shim| shim.run_script(request).await)?;
    let whole = millis(clock.elapsed());
    ensure!(result.status() == ScriptStatus::Success, "{result:?}");
    let agent = result.started.as_ref().map(|started| started.agent());
    ensure!(agent == Some(form), "{:?}", result.started);
    let is_plot = |content: &Option<Content>| matches!(content, Some(Content::Binary(png)) if png.starts_with(PNG));
    ensure!(is_plot(&result.outputs[0].content), "it is no PNG");
    Ok(whole)
}

fn docker_run() -> anyhow::Result<f64> {
    let workspace = tempfile::tempdir()?;
    chown(workspace.path(), Some(1000), Some(1000))?;
    let mount = format!("{}:/workspace", workspace.path().display());
    let clock = Instant::now();
    fs::write(workspace.path().join("script.py"), SCRIPT)?;
    let mut command = docker::command();
    command
        .args(["run", "--rm", "--network=none", "--cpus=2", "--memory=2g"])
        .args(["--memory-swap=2g", "--pids-limit=256", "--volume", &mount])
        .args(["polydev-python-sandbox:latest", "python", "script.py"]);
    let ran = output(&mut command);
    let png = fs::read(workspace.path().join("plot.png"));
    let whole = millis(clock.elapsed());
    let stderr = String::from_utf8_lossy(&ran.stderr);
    ensure!(png.is_ok_and(|png| png.starts_with(PNG)), "{stderr}");
    Ok(whole)
}
