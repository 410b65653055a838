//! One run that prints as fast as it can, to a caller that reads as fast as it can.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use bollard::exec::{CreateExecOptions, StartExecOptions, StartExecResults};
use futures_util::StreamExt;
use polydev_proto::runtime::run_event::Event;
use polydev_tests::{
    client::{Client, argv},
    docker,
    shim::Shim,
};
use procfs::process::Process;
use serde_json::{Value, json};

const BYTES: u64 = 500_000_000;
const SAMPLES: usize = 5;
/// The limits of both sides: half a core, as every run has.
const LIMITS: [&str; 3] = ["--cpus=0.5", "--memory=512m", "--memory-swap=512m"];

fn command() -> [String; 4] {
    ["head", "-c", &BYTES.to_string(), "/dev/zero"].map(str::to_owned)
}

pub(super) fn figures(image: &str) -> anyhow::Result<Vec<Value>> {
    let runtime = tokio::runtime::Runtime::new()?;
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let start = ["run", "--detach", "-e", "WARM_POOL=true"];
    let start = [&start[..], &LIMITS, &[image]].concat();
    let container = docker::docker(&start).trim().to_owned();
    let measured = measure(&shim, &client, &runtime, &container);
    docker::docker(&["rm", "--force", &container]);
    let (ours, cpu, theirs) = measured?;
    let p50 = |samples: &[f64]| super::Summary::of(samples).p50;
    let ratio = p50(&ours) / p50(&theirs);
    Ok(vec![
        json!({
            "name": "500 MB from a command to its caller, through the shim",
            "unit": "MB/s", "n": ours.len(), "p50": p50(&ours),
            "against": {
                "name": "docker exec of the same command, over Docker's API",
                "unit": "MB/s", "n": theirs.len(), "p50": p50(&theirs),
            },
            "ratio": ratio, "bound": "at least as fast", "holds": ratio >= 1.0,
        }),
        json!({
            "name": "the same, for each second of CPU of driver and shim",
            "unit": "MB/s", "n": cpu.len(), "p50": p50(&cpu),
            "bound": ">= 500", "holds": p50(&cpu) >= 500.0,
        }),
    ])
}

type Samples = (Vec<f64>, Vec<f64>, Vec<f64>);

fn measure(
    shim: &Shim,
    client: &Client,
    runtime: &tokio::runtime::Runtime,
    container: &str,
) -> anyhow::Result<Samples> {
    let docker = bollard::Docker::connect_with_unix_defaults()?;
    let docker = runtime.block_on(docker.negotiate_version())?;
    let driver = fs::read_to_string(shim.state_dir().join("driver.lock"))?;
    let processes = [driver.trim().parse()?, shim.process.pid().as_raw()];
    let (mut ours, mut cpu, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..SAMPLES {
        client.wait_idle("anthropic", 1);
        let before = cpu_of(processes)?;
        ours.push(rate(run(client)?));
        cpu.push(rate(cpu_of(processes)? - before));
        theirs.push(rate(runtime.block_on(docker_exec(&docker, container))?));
    }
    Ok((ours, cpu, theirs))
}

fn run(client: &Client) -> anyhow::Result<Duration> {
    let command = command();
    let start = Instant::now();
    let mut run = client.start(argv("anthropic", &command.each_ref().map(|part| &**part)))?;
    let mut read = 0;
    loop {
        match client
            .next(&mut run)?
            .context("the stream ended before the run")?
        {
            Event::Stdout(output) => read += output.data.len() as u64,
            Event::Exited(_) if read == BYTES => return Ok(start.elapsed()),
            Event::Exited(exited) => bail!("{read} bytes came: {exited:?}"),
            _ => {}
        }
    }
}

async fn docker_exec(docker: &bollard::Docker, container: &str) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let options = CreateExecOptions {
        attach_stdout: Some(true),
        cmd: Some(command().to_vec()),
        ..Default::default()
    };
    let exec = docker.create_exec(container, options).await?;
    let wide = StartExecOptions {
        output_capacity: Some(64 << 10),
        ..Default::default()
    };
    let StartExecResults::Attached { mut output, .. } =
        docker.start_exec(&exec.id, Some(wide)).await?
    else {
        bail!("docker did not attach");
    };
    let mut read = 0;
    while let Some(piece) = output.next().await {
        read += piece?.into_bytes().len() as u64;
    }
    if read != BYTES {
        bail!("{read} bytes came from docker exec");
    }
    Ok(start.elapsed())
}

/// The CPU time of the processes so far.
fn cpu_of(processes: [i32; 2]) -> anyhow::Result<Duration> {
    let mut ticks = 0;
    for pid in processes {
        let stat = Process::new(pid)?.stat()?;
        ticks += stat.utime + stat.stime;
    }
    let per_second = procfs::ticks_per_second();
    Ok(Duration::from_millis(ticks * 1000 / per_second))
}

fn rate(time: Duration) -> f64 {
    BYTES as f64 / 1e6 / time.as_secs_f64()
}
