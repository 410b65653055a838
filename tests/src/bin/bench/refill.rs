//! Refills: how long a slot's refill takes after a run, and what it costs other claims.

use std::{
    collections::HashMap,
    io::Read,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use bollard::{
    Docker,
    models::{ContainerCreateBody, HostConfig},
    query_parameters::{CreateContainerOptions, RemoveContainerOptions},
};
use polydev_tests::{
    client::{Client, argv},
    shim::Shim,
};
use serde_json::{Value, json};

use super::{COMMAND, IMAGE, Summary, millis, warm_claim};

const SLOTS: u32 = 8;
const SAMPLES: usize = 20;
/// The number of claims whose percentiles are compared.
const CLAIMS: usize = 200;
/// The time from the end of a run to the next claim, while the run's slot is being refilled.
const PAUSE: Duration = Duration::from_millis(100);
const RATE_TIME: Duration = Duration::from_secs(20);

pub(super) fn figures() -> anyhow::Result<Vec<Value>> {
    let runtime = tokio::runtime::Runtime::new()?;
    let docker = runtime.block_on(async {
        let docker = Docker::connect_with_unix_defaults()?;
        docker.negotiate_version().await
    })?;
    let shim = Shim::dev(&[&format!("anthropic={SLOTS}")]);
    let client = shim.client();

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..SAMPLES {
        ours.push(refill(&client, SLOTS)?);
        theirs.push(runtime.block_on(container(&docker))?);
    }
    let [connected, unconnected] = networks()?;
    let [idle, idle_programs] = claims(&client, false)?;
    let [busy, busy_programs] = claims(&client, true)?;
    let (runs, containers) = (rate_of_runs(&shim)?, rate_of_containers(&runtime, &docker)?);

    let (our, their) = (Summary::of(&ours), Summary::of(&theirs));
    let (idle, busy) = (Summary::of(&idle), Summary::of(&busy));
    let (alone, beside) = (Summary::of(&idle_programs), Summary::of(&busy_programs));
    let ratio = our.p50 / their.p50;
    let slower = busy.p99 / idle.p99;
    Ok(vec![
        json!({
            "name": "from the end of a run until its slot is idle again", "unit": "ms",
            "n": ours.len(), "p50": our.p50, "p90": our.p90, "p99": our.p99,
            "against": {
                "name": "create, start and remove a container with these limits, over Docker's API",
                "unit": "ms", "n": theirs.len(),
                "p50": their.p50, "p90": their.p90, "p99": their.p99,
            },
            "ratio": ratio, "bound": "ratio <= 1.2", "holds": ratio <= 1.2,
        }),
        json!({
            "name": "refill of a slot without a network", "unit": "ms", "n": SAMPLES,
            "p50": unconnected.p50, "p90": unconnected.p90, "p99": unconnected.p99,
            "against": {
                "name": "of a slot with one", "unit": "ms", "n": SAMPLES,
                "p50": connected.p50, "p90": connected.p90, "p99": connected.p99,
            },
            "ratio": unconnected.p50 / connected.p50, "bound": "ratio <= 0.75",
            "holds": unconnected.p50 <= 0.75 * connected.p50,
        }),
        json!({
            "name": "runs a second, as many callers as slots", "unit": "/s",
            "n": 1, "value": runs,
            "against": {
                "name": "containers a second over Docker's API, as many callers",
                "unit": "/s", "n": 1, "value": containers,
            },
            "ratio": runs / containers, "bound": ">= 3 a second", "holds": runs >= 3.0,
        }),
        json!({
            "name": "warm claim to first byte, while a slot is being refilled", "unit": "ms",
            "n": CLAIMS, "p50": busy.p50, "p90": busy.p90, "p99": busy.p99,
            "against": {
                "name": "the same, while nothing is", "unit": "ms", "n": CLAIMS,
                "p50": idle.p50, "p90": idle.p90, "p99": idle.p99,
            },
            "ratio": slower, "bound": "p99 <= 2 times", "holds": slower <= 2.0,
        }),
        json!({
            "name": "a program of the machine's own, at the same moments", "unit": "ms",
            "n": CLAIMS, "p50": beside.p50, "p90": beside.p90, "p99": beside.p99,
            "against": {
                "name": "the same, while nothing is refilled", "unit": "ms", "n": CLAIMS,
                "p50": alone.p50, "p90": alone.p90, "p99": alone.p99,
            },
            "ratio": beside.p99 / alone.p99, "bound": "none", "holds": true,
        }),
    ])
}

/// Milliseconds from the end of a run until its slot is idle again.
fn refill(client: &Client, slots: u32) -> anyhow::Result<f64> {
    client.wait_idle("anthropic", slots);
    client.run(argv("anthropic", &["true"]))?;
    let ended = Instant::now();
    client.wait_idle("anthropic", slots);
    Ok(millis(ended.elapsed()))
}

/// Refills of a slot with a network interface, and of one without.
fn networks() -> anyhow::Result<[Summary; 2]> {
    let shims = [&[][..], &["--egress=anthropic="]].map(|egress| {
        let shim = Shim::dev_with(&["anthropic=1"], egress);
        (shim.client(), shim)
    });
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..SAMPLES {
        for ((client, _), samples) in shims.iter().zip(&mut samples) {
            samples.push(refill(client, 1)?);
        }
    }
    Ok(samples.map(|samples| Summary::of(&samples)))
}

/// Milliseconds that Docker alone takes for a container like a slot's.
async fn container(docker: &Docker) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let tmpfs = ["/tmp", "/run", "/home/runtime"].map(|path| (path.to_owned(), String::new()));
    let body = ContainerCreateBody {
        image: Some(IMAGE.into()),
        entrypoint: Some(vec!["sleep".into(), "1000".into()]),
        cmd: Some(vec![]),
        host_config: Some(HostConfig {
            cap_drop: Some(vec!["ALL".into()]),
            readonly_rootfs: Some(true),
            memory: Some(256 << 20),
            memory_swap: Some(256 << 20),
            cpu_period: Some(100_000),
            cpu_quota: Some(10_000),
            pids_limit: Some(64),
            tmpfs: Some(HashMap::from(tmpfs)),
            ..Default::default()
        }),
        ..Default::default()
    };
    let id = docker
        .create_container(None::<CreateContainerOptions>, body)
        .await?
        .id;
    docker.start_container(&id, None).await?;
    let force = RemoveContainerOptions {
        force: true,
        ..Default::default()
    };
    docker.remove_container(&id, Some(force)).await?;
    Ok(millis(begun.elapsed()))
}

/// Claims while nothing is being refilled, or shortly after the end of another run. Also measures
/// how long the machine itself takes to start a program at that moment.
fn claims(client: &Client, is_refilling: bool) -> anyhow::Result<[Vec<f64>; 2]> {
    client.wait_idle("anthropic", SLOTS);
    warm_claim(client)?;
    let (mut claims, mut programs) = (Vec::new(), Vec::new());
    for _ in 0..CLAIMS {
        if is_refilling {
            std::thread::park_timeout(PAUSE);
            // Refills take longer than the claims of one caller: wait until they catch up.
            while client.pool("anthropic").idle < SLOTS / 4 {
                std::thread::park_timeout(PAUSE);
            }
            if client.pool("anthropic").idle == SLOTS {
                bail!("nothing is being refilled");
            }
        } else {
            client.wait_idle("anthropic", SLOTS);
        }
        // The first of both is nearer to the end of the last run.
        if programs.len() % 2 == 0 {
            programs.push(program()?);
            claims.push(warm_claim(client)?);
        } else {
            claims.push(warm_claim(client)?);
            programs.push(program()?);
        }
    }
    Ok([claims, programs])
}

/// Milliseconds to the first byte of the same command outside a container.
fn program() -> anyhow::Result<f64> {
    let begun = Instant::now();
    let [program, arguments @ ..] = COMMAND;
    let mut child = Command::new(program)
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = child.stdout.take().context("it has a pipe")?;
    output.read_exact(&mut [0])?;
    let first = millis(begun.elapsed());
    child.wait()?;
    Ok(first)
}

/// Runs per second. Each slot has a caller that starts the next run when a run ends.
fn rate_of_runs(shim: &Shim) -> anyhow::Result<f64> {
    let (over, ran) = (AtomicBool::new(false), AtomicUsize::new(0));
    shim.client().wait_idle("anthropic", SLOTS);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..SLOTS)
            .map(|_| {
                scope.spawn(|| {
                    let client = shim.client();
                    while !over.load(Ordering::Relaxed) {
                        client.run(argv("anthropic", &["true"]))?;
                        ran.fetch_add(1, Ordering::Relaxed);
                    }
                    anyhow::Ok(())
                })
            })
            .collect();
        // The first runs find warm slots, so they do not count.
        std::thread::park_timeout(RATE_TIME / 4);
        let (before, since) = (ran.load(Ordering::Relaxed), begun.elapsed());
        std::thread::park_timeout(RATE_TIME);
        let (after, now) = (ran.load(Ordering::Relaxed), begun.elapsed());
        over.store(true, Ordering::Relaxed);
        for caller in callers {
            caller.join().ok().context("a caller panicked")??;
        }
        Ok((after - before) as f64 / (now - since).as_secs_f64())
    })
}

fn rate_of_containers(runtime: &tokio::runtime::Runtime, docker: &Docker) -> anyhow::Result<f64> {
    let made = Arc::new(AtomicUsize::new(0));
    let begun = Instant::now();
    runtime.block_on(async {
        let callers = (0..SLOTS).map(|_| {
            let (docker, made) = (docker.clone(), made.clone());
            tokio::spawn(async move {
                while begun.elapsed() < RATE_TIME {
                    container(&docker).await?;
                    made.fetch_add(1, Ordering::Relaxed);
                }
                anyhow::Ok(())
            })
        });
        for caller in futures_util::future::try_join_all(callers).await? {
            caller?;
        }
        anyhow::Ok(())
    })?;
    Ok(made.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64())
}
