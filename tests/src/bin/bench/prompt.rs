//! A prompt to a real CLI, in three ways in turn: parked, cold in a warm container, and by
//! `docker run`. All have the limits of a run, and the same model API, a stand-in.
//!
//! Measured from the caller's request to the model request that has the prompt; for Gemini CLI,
//! which asks a small model first, to the whole answer.

use std::{
    collections::BTreeMap,
    fs,
    process::Stdio,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, bail, ensure};
use polydev_proto::runtime::{RunStart, run_event::Event, started};
use polydev_stand_in::Text;
use polydev_tests::{
    client::{Client, prompt},
    docker, fresh_key,
    host::Local,
    shim::Shim,
};
use serde_json::{Value, json};

use super::{Summary, millis};

/// One CLI, and the bounds of its figures. Gemini CLI has fewer samples, because a cold one takes six
/// seconds.
struct Cli {
    provider: &'static str,
    name: &'static str,
    /// Of each way.
    samples: usize,
    /// Whether the time is that of the whole answer.
    is_whole: bool,
    p50: f64,
    p99: f64,
    to_cold: f64,
    to_docker: f64,
    /// For `docker run`.
    argv: fn(&str, &str) -> Vec<String>,
}

const CLIS: [Cli; 3] = [
    Cli {
        provider: "anthropic",
        name: "Claude",
        samples: 50,
        is_whole: false,
        p50: 200.0,
        p99: 450.0,
        to_cold: 0.17,
        to_docker: 0.10,
        argv: |text, _| words(&["claude", "-p", "--dangerously-skip-permissions", "--", text]),
    },
    Cli {
        provider: "openai",
        name: "Codex",
        samples: 50,
        is_whole: false,
        p50: 80.0,
        p99: 250.0,
        to_cold: 0.20,
        to_docker: 0.12,
        argv: |text, url| {
            let url = format!("openai_base_url=\"{url}/v1\"");
            let mut argv = words(&["codex", "exec", "--skip-git-repo-check"]);
            argv.extend(words(&[
                "--dangerously-bypass-approvals-and-sandbox",
                "-c",
                &url,
            ]));
            argv.extend(words(&["--", text]));
            argv
        },
    },
    Cli {
        provider: "google",
        name: "Gemini",
        samples: 20,
        is_whole: true,
        p50: 200.0,
        p99: 500.0,
        to_cold: 0.05,
        to_docker: 0.04,
        argv: |text, _| {
            let text = format!("--prompt={text}");
            words(&["gemini", "--skip-trust", "--yolo", &text])
        },
    },
];

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

pub(super) fn figures() -> anyhow::Result<Vec<Value>> {
    let mut figures = Vec::new();
    for cli in &CLIS {
        figures.extend(of(cli)?);
    }
    Ok(figures)
}

fn of(cli: &Cli) -> anyhow::Result<Vec<Value>> {
    let model = Local::start();
    let pool = format!("{}=1", cli.provider);
    let url = format!("--base-url={}={}", cli.provider, model.url);
    let none = format!("--egress={}=", cli.provider);
    let with = Shim::dev_with(&[&pool], &[&url, &none, "--agents=true"]);
    let without = Shim::dev_with(&[&pool], &[&url, &none]);
    let (parking, starting) = (with.client(), without.client());
    let idle = idle_cost(&with)?;
    let (mut parked, mut cold, mut by_docker) = (Vec::new(), Vec::new(), Vec::new());
    for sample in 0..cli.samples {
        for client in [&parking, &starting] {
            client.wait_idle(cli.provider, 1);
        }
        parked.push(by_shim(cli, &parking, &model, started::Agent::Parked)?);
        parking.wait_idle(cli.provider, 1);
        cold.push(by_shim(cli, &starting, &model, started::Agent::Cold)?);
        starting.wait_idle(cli.provider, 1);
        by_docker.push(docker_run(cli, &model)?);
        if sample % 10 == 9 {
            eprintln!("{}: {} of {} samples", cli.name, sample + 1, cli.samples);
        }
    }
    let refill = refill(cli, &parking)?;
    let [parked, cold, by_docker] = [parked, cold, by_docker].map(|all| Summary::of(&all));
    let until = if cli.is_whole { "answer" } else { "request" };
    let figure = |other: &Summary, name: &str, most: f64| {
        let ratio = parked.p50 / other.p50;
        json!({
            "name": format!("{} parked, to the model {until}", cli.name),
            "unit": "ms", "n": cli.samples,
            "p50": parked.p50, "p90": parked.p90, "p99": parked.p99,
            "against": {
                "name": format!("{} {name}", cli.name), "unit": "ms", "n": cli.samples,
                "p50": other.p50, "p90": other.p90, "p99": other.p99,
            },
            "ratio": ratio,
            "bound": format!("p50 <= {} ms, p99 <= {} ms, ratio <= {most}", cli.p50, cli.p99),
            "holds": parked.p50 <= cli.p50 && parked.p99 <= cli.p99 && ratio <= most,
        })
    };
    let mut figures = vec![
        figure(&cold, "cold in a warm container", cli.to_cold),
        figure(&by_docker, "by `docker run --network host`", cli.to_docker),
    ];
    for (name, unit, value) in [
        ("idle agent, of a core", "%", idle.cpu_percent),
        ("idle agent's container, charged memory", "MB", idle.memory),
        ("refills with an agent", "1/s", refill),
    ] {
        figures.push(json!({
            "name": format!("{}: {name}", cli.name), "unit": unit, "n": 1, "value": value,
            "bound": "told", "holds": true,
        }));
    }
    Ok(figures)
}

fn asks(cli: &Cli, text: &str) -> RunStart {
    RunStart {
        env: BTreeMap::new(),
        ..prompt(cli.provider, text, &fresh_key(), "")
    }
}

fn now() -> f64 {
    millis(SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default())
}

/// When the model API had the request with this prompt.
fn asked_at(model: &Local, text: &str) -> anyhow::Result<f64> {
    let wanted = Text::of(text);
    let requests = model.requests();
    let found = requests
        .iter()
        .find(|request| request.texts.contains(&wanted));
    found
        .map(|request| request.at_ms)
        .context("the model was not asked")
}

fn by_shim(cli: &Cli, client: &Client, model: &Local, form: started::Agent) -> anyhow::Result<f64> {
    let text = format!("What is {}?", fresh_key());
    let (begin, clock) = (now(), Instant::now());
    let mut run = client.start(asks(cli, &text))?;
    let mut answer = String::new();
    loop {
        match client
            .next(&mut run)?
            .context("the stream ended before the run")?
        {
            Event::Started(started) => {
                ensure!(started.agent() == form, "{}: {started:?}", cli.name);
            }
            Event::Stdout(output) => answer.push_str(&String::from_utf8_lossy(&output.data)),
            Event::Exited(exited) if exited.exit_code == 0 => break,
            Event::Exited(exited) => bail!("{} failed: {exited:?}", cli.name),
            _ => {}
        }
    }
    let whole = millis(clock.elapsed());
    ensure!(answer.contains(&Text::of(&text).sha256), "{answer}");
    match cli.is_whole {
        true => Ok(whole),
        false => Ok(asked_at(model, &text)? - begin),
    }
}

fn docker_run(cli: &Cli, model: &Local) -> anyhow::Result<f64> {
    let text = format!("What is {}?", fresh_key());
    let image = format!("polydev-{}-runtime:latest", cli.provider);
    let url = &model.url;
    let variables = [
        format!("ANTHROPIC_BASE_URL={url}"),
        "ANTHROPIC_API_KEY=placeholder".into(),
        format!("OPENAI_BASE_URL={url}/v1"),
        "OPENAI_API_KEY=placeholder".into(),
        "CODEX_API_KEY=placeholder".into(),
        format!("GOOGLE_GEMINI_BASE_URL={url}"),
        "GOOGLE_API_KEY=placeholder".into(),
    ];
    let mut command = docker::command();
    command.args(["run", "--rm", "--network=host", "--cpus=0.5"]);
    command.args(["--memory=512m", "--memory-swap=512m", "--pids-limit=256"]);
    for variable in &variables {
        command.args(["--env", variable]);
    }
    command.arg(&image).args((cli.argv)(&text, url));
    let (begin, clock) = (now(), Instant::now());
    let ran = command.stdin(Stdio::null()).output()?;
    let whole = millis(clock.elapsed());
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&ran.stderr).into_owned();
    ensure!(said.contains(&Text::of(&text).sha256), "{said} {complaint}");
    match cli.is_whole {
        true => Ok(whole),
        false => Ok(asked_at(model, &text)? - begin),
    }
}

/// What an agent costs while it waits.
struct Idle {
    cpu_percent: f64,
    memory: f64,
}

/// A stopped CLI uses nothing in this time.
const QUIET_TIME: Duration = Duration::from_secs(2);
/// A CLI that is never stopped is measured all the same.
const QUIET_TIMEOUT: Duration = Duration::from_secs(60);
/// Over this time.
const IDLE_TIME: Duration = Duration::from_secs(20);

fn idle_cost(shim: &Shim) -> anyhow::Result<Idle> {
    let ids = docker::containers(&shim.label());
    let id = ids.first().context("a slot has a container")?;
    let cpu = || cgroup(id, "cpuacct", "cpuacct.usage").or_else(|_| cgroup_v2_cpu(id));
    // A CLI that is ready works for some time yet, and is stopped then.
    let give_up = Instant::now() + QUIET_TIMEOUT;
    loop {
        let before = cpu()?;
        std::thread::sleep(QUIET_TIME);
        if cpu()? == before || Instant::now() > give_up {
            break;
        }
    }
    let before = cpu()?;
    std::thread::sleep(IDLE_TIME);
    let used = cpu()? - before;
    let memory = cgroup(id, "memory", "memory.usage_in_bytes")
        .or_else(|_| cgroup(id, "", "memory.current"))?;
    Ok(Idle {
        cpu_percent: used / (IDLE_TIME.as_secs_f64() * 1e9) * 100.0,
        memory: memory / 1e6,
    })
}

/// A figure of a container's control group.
fn cgroup(id: &str, controller: &str, file: &str) -> anyhow::Result<f64> {
    let text = fs::read_to_string(format!("{}/{file}", group(id, controller)?))?;
    Ok(text.trim().parse()?)
}

fn cgroup_v2_cpu(id: &str) -> anyhow::Result<f64> {
    let text = fs::read_to_string(format!("{}/cpu.stat", group(id, "")?))?;
    let used = text
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "));
    Ok(used
        .context("cpu.stat has no usage_usec")?
        .trim()
        .parse::<f64>()?
        * 1e3)
}

/// The folder of a container's control group; without a controller, that of version 2.
fn group(id: &str, controller: &str) -> anyhow::Result<String> {
    let pid = docker::inspect(id)["State"]["Pid"]
        .as_i64()
        .context("it has a pid")?;
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = groups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        controllers
            .split(',')
            .any(|name| name == controller)
            .then_some(path)
    });
    let path = path.with_context(|| format!("no group of `{controller}`"))?;
    let root = match controller {
        "" => "/sys/fs/cgroup".to_owned(),
        name => format!("/sys/fs/cgroup/{name}"),
    };
    Ok(format!("{root}{path}"))
}

/// How many times a second one slot is filled again after a run that does nothing.
fn refill(cli: &Cli, client: &Client) -> anyhow::Result<f64> {
    const RUNS: u32 = 5;
    client.wait_idle(cli.provider, 1);
    let begin = Instant::now();
    for _ in 0..RUNS {
        let outcome = client.run(polydev_tests::client::argv(cli.provider, &["true"]));
        let outcome = outcome.map_err(|error| anyhow::anyhow!("{error:?}"))?;
        ensure!(outcome.exited.exit_code == 0, "{:?}", outcome.exited);
        client.wait_idle(cli.provider, 1);
    }
    Ok(f64::from(RUNS) / begin.elapsed().as_secs_f64())
}
