//! `make bench`: how fast and how small, against what a user would use instead, in
//! one run; `bench PART...` measures `warm`, `prompt`, `script`, `broker`, `credentials`, `swarm`, `telemetry`, `policy`, `refill`, `runs`, `stream`, `starts`, `logs`, `bandwidth` or `many` alone.
//! Prints a table; a whole run writes it to `target/bench/results.json`. Every sample of the
//! warm slots goes to `target/bench/samples.json`.

mod bandwidth;
mod broker;
mod credentials;
mod plain;
mod policy;
mod prompt;
mod refill;
mod runs;
mod scripts;
mod starts;
mod stream;
mod swarm;
mod telemetry;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use bollard::exec::{CreateExecOptions, StartExecResults};
use futures_util::StreamExt;
use polydev_proto::runtime::{CredentialMode, RunStart, run_event::Event};
use polydev_tests::{
    client::{Client, api_key, argv},
    docker, root,
    shim::Shim,
};
use serde_json::{Value, json};

const PARTS: [&str; 15] = [
    "warm",
    "prompt",
    "script",
    "broker",
    "credentials",
    "swarm",
    "telemetry",
    "policy",
    "refill",
    "runs",
    "stream",
    "starts",
    "logs",
    "bandwidth",
    "many",
];
const SLOTS: u32 = 8;
const SAMPLES: usize = 100;
/// The command of both sides.
const COMMAND: [&str; 3] = ["sh", "-c", "echo hi"];
const IMAGE: &str = "polydev-anthropic-runtime:latest";

fn main() -> anyhow::Result<()> {
    let parts: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = parts.iter().find(|part| !PARTS.contains(&part.as_str())) {
        bail!("`{unknown}` is no part; allowed are {}", PARTS.join(", "));
    }
    let is_wanted = |part: &str| parts.is_empty() || parts.iter().any(|wanted| wanted == part);
    let folder = root().join("target/bench");
    fs::create_dir_all(&folder)?;
    let mut figures = Vec::new();
    if is_wanted("warm") {
        figures.extend(warm_figures(&folder)?);
    }
    if is_wanted("prompt") {
        figures.extend(prompt::figures()?);
    }
    if is_wanted("script") {
        figures.extend(scripts::figures()?);
    }
    if is_wanted("broker") {
        figures.extend(broker::figures()?);
    }
    if is_wanted("credentials") {
        figures.extend(credentials::figures()?);
    }
    if is_wanted("swarm") {
        figures.extend(swarm::figures()?);
    }
    if is_wanted("telemetry") {
        figures.extend(telemetry::figures()?);
    }
    if is_wanted("policy") {
        figures.extend(policy::figures()?);
    }
    if is_wanted("refill") {
        figures.extend(refill::figures()?);
    }
    if is_wanted("runs") {
        figures.extend(runs::figures()?);
    }
    if is_wanted("stream") {
        figures.extend(stream::figures(IMAGE)?);
    }
    if PARTS[11..].iter().any(|part| is_wanted(part)) {
        figures.extend(plain::figures(is_wanted)?);
    }
    if parts.is_empty() {
        let results = serde_json::to_string_pretty(&figures)?;
        fs::write(folder.join("results.json"), results)?;
    }
    print(&figures);
    Ok(())
}

/// Warm slots against `docker exec`.
fn warm_figures(folder: &Path) -> anyhow::Result<Vec<Value>> {
    let runtime = tokio::runtime::Runtime::new()?;
    let shim = Shim::dev(&[&format!("anthropic={SLOTS}")]);
    let client = shim.client();
    let memory = memory(&shim)?;

    // A container for `docker exec` with the limits of a run. Its process is as idle as init.
    let limits = [
        "--cpus=0.5",
        "--memory=512m",
        "--memory-swap=512m",
        "--pids-limit=256",
    ];
    let start = [
        &["run", "--detach", "-e", "WARM_POOL=true"],
        &limits[..],
        &[IMAGE],
    ]
    .concat();
    let container = docker::docker(&start).trim().to_owned();
    let keys = keys(&client);
    let measured = measure(&client, &runtime, &container);
    docker::docker(&["rm", "--force", &container]);
    let (warm, exec) = measured?;
    let [inside, outside] = keys?;

    let (warm_summary, exec_summary) = (Summary::of(&warm), Summary::of(&exec));
    let ratio = exec_summary.p50 / warm_summary.p50;
    let mut figures = vec![json!({
        "name": "warm claim to first byte, through the shim",
        "unit": "ms",
        "n": warm.len(),
        "p50": warm_summary.p50, "p90": warm_summary.p90, "p99": warm_summary.p99,
        "against": {
            "name": "docker exec of the same command, over Docker's API",
            "unit": "ms",
            "n": exec.len(),
            "p50": exec_summary.p50, "p90": exec_summary.p90, "p99": exec_summary.p99,
        },
        "ratio": ratio,
        "bound": "p50 <= 5 ms, p99 <= 20 ms, ratio >= 8",
        "holds": warm_summary.p50 <= 5.0 && warm_summary.p99 <= 20.0 && ratio >= 8.0,
    })];
    let (inside, outside) = (Summary::of(&inside), Summary::of(&outside));
    let ratio = outside.p50 / inside.p50;
    figures.push(json!({
        "name": "warm claim with a key at the broker", "unit": "ms", "n": SAMPLES,
        "p50": outside.p50, "p90": outside.p90, "p99": outside.p99,
        "against": {
            "name": "with a key in the container", "unit": "ms", "n": SAMPLES,
            "p50": inside.p50, "p90": inside.p90, "p99": inside.p99,
        },
        "ratio": ratio, "bound": "ratio <= 1.05", "holds": ratio <= 1.05,
    }));
    for (name, value, most) in memory {
        figures.push(json!({
            "name": name, "unit": "MB", "n": 1, "value": value,
            "bound": format!("<= {most} MB"), "holds": value <= most,
        }));
    }

    drop((client, shim));
    let samples = json!({ "warm_claim_ms": warm, "docker_exec_ms": exec });
    fs::write(
        folder.join("samples.json"),
        serde_json::to_string_pretty(&samples)?,
    )?;
    Ok(figures)
}

/// Milliseconds from request to first byte: warm claims, and `docker exec` in between.
fn measure(
    client: &Client,
    runtime: &tokio::runtime::Runtime,
    container: &str,
) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let docker = bollard::Docker::connect_with_unix_defaults()?;
    let docker = runtime.block_on(docker.negotiate_version())?;
    let (mut warm, mut exec) = (Vec::new(), Vec::new());
    for sample in 0..SAMPLES {
        // The machine is idle: every slot is warm again, and none is being refilled.
        client.wait_idle("anthropic", SLOTS);
        warm.push(warm_claim(client)?);
        client.wait_idle("anthropic", SLOTS);
        exec.push(runtime.block_on(docker_exec(&docker, container))?);
        if sample % 20 == 19 {
            eprintln!("{} of {SAMPLES} samples", sample + 1);
        }
    }
    Ok((warm, exec))
}

/// Milliseconds from request to first byte of claims with a credential, in the container and at
/// the broker in turn.
fn keys(client: &Client) -> anyhow::Result<[Vec<f64>; 2]> {
    let (mut inside, mut outside) = (Vec::new(), Vec::new());
    for _ in 0..SAMPLES {
        for (mode, samples) in [
            (CredentialMode::Inject, &mut inside),
            (CredentialMode::Broker, &mut outside),
        ] {
            client.wait_idle("anthropic", SLOTS);
            samples.push(claim(
                client,
                RunStart {
                    credential: Some(api_key("placeholder")),
                    credential_mode: mode.into(),
                    ..argv("anthropic", &COMMAND)
                },
            )?);
        }
    }
    Ok([inside, outside])
}

fn warm_claim(client: &Client) -> anyhow::Result<f64> {
    claim(client, argv("anthropic", &COMMAND))
}

fn claim(client: &Client, run: RunStart) -> anyhow::Result<f64> {
    let start = Instant::now();
    let mut run = client.start(run)?;
    let mut first = None;
    loop {
        match client.next(&mut run)? {
            Some(Event::Stdout(_)) if first.is_none() => first = Some(millis(start.elapsed())),
            Some(Event::Exited(exited)) if exited.exit_code == 0 => {
                return first.context("the command wrote nothing");
            }
            Some(Event::Exited(exited)) => bail!("the command failed: {exited:?}"),
            Some(_) => {}
            None => bail!("the stream ended before the run"),
        }
    }
}

async fn docker_exec(docker: &bollard::Docker, container: &str) -> anyhow::Result<f64> {
    let start = Instant::now();
    let options = CreateExecOptions {
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        cmd: Some(COMMAND.to_vec()),
        ..Default::default()
    };
    let exec = docker.create_exec(container, options).await?;
    let StartExecResults::Attached { mut output, .. } = docker.start_exec(&exec.id, None).await?
    else {
        bail!("docker did not attach");
    };
    output.next().await.context("the command wrote nothing")??;
    let first = millis(start.elapsed());
    while output.next().await.is_some() {}
    Ok(first)
}

/// Resident memory of driver, shim and the largest idle init, in MB (10^6), with the maximum
/// for each.
fn memory(shim: &Shim) -> anyhow::Result<Vec<(String, f64, f64)>> {
    let lock = fs::read_to_string(shim.state_dir().join("driver.lock"))?;
    let mut inits = BTreeMap::new();
    for id in docker::containers(&shim.label()) {
        let pid = docker::inspect(&id)["State"]["Pid"]
            .as_i64()
            .context("a container has a pid")?;
        inits.insert(id, resident(pid)?);
    }
    let init = inits.values().copied().fold(0.0, f64::max);
    Ok(vec![
        (
            format!("driver, resident with {SLOTS} slots"),
            resident(lock.trim().parse()?)?,
            25.0,
        ),
        (
            format!("shim, resident with {SLOTS} slots"),
            resident(shim.process.pid().as_raw().into())?,
            25.0,
        ),
        ("init, resident while idle".to_owned(), init, 1.5),
    ])
}

fn resident(pid: i64) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(Path::new(&path)).with_context(|| path.clone())?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: f64 = line
        .and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok())
        .with_context(|| format!("{path} has no VmRSS"))?;
    Ok(kib * 1024.0 / 1e6)
}

struct Summary {
    p50: f64,
    p90: f64,
    p99: f64,
}

impl Summary {
    fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        // The smallest sample that so many percent of the samples do not exceed.
        let at = |percent: usize| sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1];
        Self {
            p50: at(50),
            p90: at(90),
            p99: at(99),
        }
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[expect(clippy::print_stdout, reason = "the table is what this program is for")]
fn print(figures: &[Value]) {
    let number = |value: &Value| {
        value
            .as_f64()
            .map_or("-".to_owned(), |value| format!("{value:.2}"))
    };
    println!(
        "{:<52} {:>5} {:>9} {:>9} {:>9}  unit",
        "figure", "n", "p50/value", "p90", "p99"
    );
    for figure in figures {
        for row in [figure, &figure["against"]]
            .into_iter()
            .filter(|row| row.is_object())
        {
            let middle = if row["value"].is_null() {
                &row["p50"]
            } else {
                &row["value"]
            };
            println!(
                "{:<52} {:>5} {:>9} {:>9} {:>9}  {}",
                row["name"].as_str().unwrap_or_default(),
                row["n"],
                number(middle),
                number(&row["p90"]),
                number(&row["p99"]),
                row["unit"].as_str().unwrap_or_default(),
            );
        }
        let bound = match (&figure["bound"], &figure["holds"]) {
            (Value::String(bound), Value::Bool(true)) => format!("{bound}: holds"),
            (Value::String(bound), _) => format!("{bound}: DOES NOT HOLD"),
            _ => "no bound".to_owned(),
        };
        let ratio = figure["ratio"]
            .as_f64()
            .map(|ratio| format!(", ratio {ratio:.2}"))
            .unwrap_or_default();
        println!("    {bound}{ratio}");
    }
}
