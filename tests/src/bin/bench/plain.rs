//! Plain tasks against Nomad's own Docker driver, on the same agent with the same image.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context;
use nix::{time::ClockId, unistd::Pid};
use polydev_tests::{
    docker_proxy::DockerProxy,
    job::{batch, events, merge, service, shell, task},
    nomad::Nomad,
};
use serde_json::{Value, json};

use super::{Summary, bandwidth, resident, starts};

const TASKS: usize = 100;
/// How long the benchmark watches a driver. Nomad samples each task every second.
const WATCH: Duration = Duration::from_secs(20);
pub(super) const DRIVERS: [&str; 2] = ["polydev", "docker"];

/// The requested figures of plain tasks.
pub(super) fn figures(is_wanted: impl Fn(&str) -> bool) -> anyhow::Result<Vec<Value>> {
    let proxy = DockerProxy::start(Path::new("/var/run/docker.sock"));
    let endpoint = format!("endpoint = \"unix://{}\"", proxy.socket().display());
    let nomad = Nomad::start_beside_docker(&endpoint);
    let mut figures = Vec::new();
    if is_wanted("starts") {
        figures.extend(starts::figures(&nomad, &proxy)?);
    }
    if is_wanted("logs") {
        figures.push(logs(&nomad)?);
    }
    if is_wanted("bandwidth") {
        figures.extend(bandwidth::figures(&nomad)?);
    }
    if is_wanted("many") {
        figures.extend(many(&nomad)?);
    }
    Ok(figures)
}

/// Milliseconds for a task that prints 100 MB.
fn logs(nomad: &Nomad) -> anyhow::Result<Value> {
    // Lines of a length that is usual in logs.
    let script = format!("yes {} | head -c 100000000", "x".repeat(99));
    let mut samples = [Vec::new(), Vec::new()];
    for round in 0..3 {
        for (driver, samples) in DRIVERS.iter().zip(&mut samples) {
            let id = format!("logs-{driver}-{round}");
            let mut job = batch(&id, shell(&script));
            task(&mut job)["Driver"] = json!(driver);
            task(&mut job)["Resources"]["CPU"] = 1000.into();
            nomad.submit(&job);
            let alloc = nomad.wait_dead(&id);
            let begin = event(&alloc, "Started").with_context(|| events(&alloc))?;
            let end = event(&alloc, "Terminated").with_context(|| events(&alloc))?;
            #[expect(
                clippy::cast_precision_loss,
                reason = "minutes in nanoseconds are below 2^52"
            )]
            samples.push((end - begin) as f64 / 1e6);
        }
    }
    Ok(against(
        "100 MB through the log, from start to end",
        "ms",
        &samples,
        1.0 / 0.9,
    ))
}

/// The driver's cost of [`TASKS`] idle tasks: memory, and CPU time to sample all tasks.
fn many(nomad: &Nomad) -> anyhow::Result<Vec<Value>> {
    let lock = fs::read_to_string(nomad.state_dir().join("driver.lock"))?;
    let pid: i64 = lock.trim().parse()?;
    let (before, idle) = (resident(pid)?, cpu_each_second(pid)?);
    let mut job = service("many", shell("sleep 1000000"));
    job["TaskGroups"][0]["Count"] = TASKS.into();
    job["TaskGroups"][0]["EphemeralDisk"]["SizeMB"] = 10.into();
    // Nomad's own process for each task's logs would not leave the machine idle.
    merge(
        task(&mut job),
        json!({ "Resources": { "CPU": 20, "MemoryMB": 16 }, "LogConfig": { "Disabled": true, "MaxFiles": 1, "MaxFileSizeMB": 1 } }),
    );
    nomad.submit(&job);
    nomad.wait_running("many", TASKS);
    let sample = cpu_each_second(pid)? - idle;
    #[expect(clippy::cast_precision_loss, reason = "a few tasks")]
    let each = (resident(pid)? - before).max(0.0) * 1000.0 / TASKS as f64;
    nomad.run(&["job", "stop", "-purge", "-yes", "many"]);
    Ok(vec![
        json!({
            "name": format!("driver, resident for each of {TASKS} plain tasks"),
            "unit": "kB", "n": TASKS, "value": each, "bound": "<= 300 kB", "holds": each <= 300.0,
        }),
        json!({
            "name": format!("driver, CPU of a sample of {TASKS} plain tasks"),
            "unit": "ms", "n": WATCH.as_secs(), "value": sample, "bound": "<= 10 ms", "holds": sample <= 10.0,
        }),
    ])
}

/// The CPU time that a process uses in a second, in milliseconds.
fn cpu_each_second(pid: i64) -> anyhow::Result<f64> {
    let (begin, before) = (Instant::now(), cpu(pid)?);
    std::thread::sleep(WATCH);
    Ok((cpu(pid)? - before).as_secs_f64() * 1e3 / begin.elapsed().as_secs_f64())
}

/// The CPU time of a process so far, including ended threads.
fn cpu(pid: i64) -> anyhow::Result<Duration> {
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(pid.try_into()?))?;
    Ok(clock.now()?.into())
}

pub(super) fn against(name: &str, unit: &str, [ours, theirs]: &[Vec<f64>; 2], most: f64) -> Value {
    let (own, other) = (Summary::of(ours), Summary::of(theirs));
    let ratio = own.p50 / other.p50;
    json!({
        "name": name, "unit": unit, "n": ours.len(), "p50": own.p50, "p90": own.p90, "p99": own.p99,
        "against": {
            "name": "the same with Nomad's Docker driver", "unit": unit, "n": theirs.len(),
            "p50": other.p50, "p90": other.p90, "p99": other.p99,
        },
        "ratio": ratio, "bound": format!("at most {most:.2} times at p50"), "holds": ratio <= most,
    })
}

/// When a task of an allocation had an event, in nanoseconds of Unix time.
pub(super) fn event(alloc: &Value, kind: &str) -> Option<i64> {
    let events = alloc["TaskStates"]["task"]["Events"].as_array()?;
    let event = events.iter().find(|event| event["Type"] == kind)?;
    event["Time"].as_i64()
}

pub(super) fn since(begin: SystemTime, nanos: i64) -> f64 {
    let end = SystemTime::UNIX_EPOCH + Duration::from_nanos(u64::try_from(nanos).unwrap_or(0));
    end.duration_since(begin).unwrap_or_default().as_secs_f64() * 1e3
}
