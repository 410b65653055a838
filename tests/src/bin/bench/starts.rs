//! How fast plain tasks start, and where the time goes, against Nomad's own Docker driver.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use polydev_tests::{
    docker::docker,
    docker_proxy::DockerProxy,
    job::{batch, events, id, merge, service, shell, task},
    nomad::Nomad,
    wait_until,
};
use serde_json::{Value, json};

use super::plain::{DRIVERS, against, event, since};

const STARTS: usize = 30;
const ROUNDS: usize = 10;
/// Lines of each of thirty tasks.
const LINES: usize = 2_000;
/// How long Nomad may take to end its processes for logs.
const LOGS: Duration = Duration::from_secs(60);
/// The stages between dispatch and Started, and how long each takes.
const STAGES: [&str; 5] = [
    "from dispatch until the client has the task",
    "until Nomad makes the task's folder",
    "Nomad's hooks, its process for logs, and the container's creation",
    "until Docker has started the container",
    "until Nomad knows",
];

/// The figures of the part `starts`.
pub(super) fn figures(nomad: &Nomad, proxy: &DockerProxy) -> anyhow::Result<Vec<Value>> {
    parameterized(nomad, "start", "true");
    parameterized(nomad, "lines", &format!("seq 1 {LINES}"));
    let mut figures = one(nomad)?;
    figures.push(eight(nomad)?);
    figures.extend(thirty(nomad)?);
    figures.push(calls(nomad, proxy));
    Ok(figures)
}

/// A job for each driver, whose command is a script.
fn parameterized(nomad: &Nomad, name: &str, script: &str) {
    for driver in DRIVERS {
        let mut job = batch(&format!("{name}-{driver}"), shell(script));
        job["ParameterizedJob"] = json!({ "Payload": "forbidden" });
        merge(
            task(&mut job),
            json!({ "Driver": driver, "Resources": { "CPU": 20, "MemoryMB": 16 } }),
        );
        nomad.submit(&job);
    }
}

/// What a round of jobs of one driver came to.
struct Round {
    begin: SystemTime,
    allocs: Vec<Value>,
}

impl Round {
    /// Dispatches jobs at once, and waits until all have ended.
    fn run(nomad: &Nomad, name: &str, driver: &str, at_once: usize) -> Self {
        let begin = SystemTime::now();
        let path = format!("/v1/job/{name}-{driver}/dispatch");
        let jobs: Vec<_> = (0..at_once).map(|_| nomad.put(&path, &json!({}))).collect();
        let id = |job: &Value| {
            job["DispatchedJobID"]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        let allocs = jobs.iter().map(|job| ended(nomad, &id(job))).collect();
        Self { begin, allocs }
    }

    /// Milliseconds until the last of the tasks had an event.
    fn until_last(&self, kind: &str) -> anyhow::Result<f64> {
        let mut last = 0;
        for alloc in &self.allocs {
            last = last.max(event(alloc, kind).with_context(|| events(alloc))?);
        }
        Ok(since(self.begin, last))
    }
}

/// Milliseconds until a task has started, and of each stage.
fn one(nomad: &Nomad) -> anyhow::Result<Vec<Value>> {
    let mut samples = [Vec::new(), Vec::new()];
    let mut stages: [[Vec<f64>; 2]; STAGES.len()] = Default::default();
    for _ in 0..STARTS {
        for (index, driver) in DRIVERS.iter().enumerate() {
            let round = Round::run(nomad, "start", driver, 1);
            samples[index].push(round.until_last("Started")?);
            for (stage, took) in stages.iter_mut().zip(stages_of(&round)?) {
                stage[index].push(took);
            }
        }
    }
    let name = "batch job: dispatch to Started";
    let mut figures = vec![against(name, "ms", &samples, 0.65)];
    figures.extend(STAGES.iter().zip(&stages).map(|(name, samples)| {
        let mut figure = against(&format!("  {name}"), "ms", samples, 1.0);
        // They say where the time goes; none has a bound of its own.
        for key in ["bound", "holds"] {
            figure[key].take();
        }
        figure
    }));
    Ok(figures)
}

/// Milliseconds of each stage of a round of one job.
fn stages_of(round: &Round) -> anyhow::Result<[f64; STAGES.len()]> {
    let alloc = &round.allocs[0];
    let nomads = |kind| event(alloc, kind).with_context(|| events(alloc));
    let begin = nanos(round.begin)?;
    let second = |nanos: i64| format!("{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000);
    let dockers = docker(&[
        "events",
        "--since",
        &second(begin),
        "--until",
        &second(nanos(SystemTime::now())?),
        "--filter",
        "type=container",
        "--format",
        "{{.Action}} {{.TimeNano}}",
    ]);
    let docker = |action: &str| -> anyhow::Result<i64> {
        let mut lines = dockers.lines().filter_map(|line| line.split_once(' '));
        let (_, at) = lines
            .find(|(of, _)| *of == action)
            .with_context(|| format!("no `{action}` in {dockers}"))?;
        Ok(at.parse()?)
    };
    let moments = [
        begin,
        nomads("Received")?,
        nomads("Task Setup")?,
        docker("create")?,
        docker("start")?,
        nomads("Started")?,
    ];
    #[expect(
        clippy::cast_precision_loss,
        reason = "seconds in nanoseconds are below 2^52"
    )]
    let millis = |index: usize| (moments[index + 1] - moments[index]) as f64 / 1e6;
    Ok(std::array::from_fn(millis))
}

fn nanos(at: SystemTime) -> anyhow::Result<i64> {
    Ok(i64::try_from(at.duration_since(UNIX_EPOCH)?.as_nanos())?)
}

/// Milliseconds until the last of eight has started.
fn eight(nomad: &Nomad) -> anyhow::Result<Value> {
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (driver, samples) in DRIVERS.iter().zip(&mut samples) {
            samples.push(Round::run(nomad, "start", driver, 8).until_last("Started")?);
        }
    }
    let name = "batch job: eight dispatched at once, to the last Started";
    Ok(against(name, "ms", &samples, 0.75))
}

/// Milliseconds until the last of thirty tasks has ended, and the lines that are lost.
fn thirty(nomad: &Nomad) -> anyhow::Result<[Value; 2]> {
    let (mut samples, mut lost) = ([Vec::new(), Vec::new()], [0, 0]);
    for _ in 0..3 {
        for (index, driver) in DRIVERS.iter().enumerate() {
            let round = Round::run(nomad, "lines", driver, 30);
            samples[index].push(round.until_last("Terminated")?);
            wait_until("the end of Nomad's processes for logs", LOGS, || {
                let readers = nomad.log_readers();
                readers
                    .is_empty()
                    .then_some(())
                    .ok_or(format!("{readers:?}"))
            });
            for alloc in &round.allocs {
                let log = nomad.logs(id(alloc), "stdout");
                let log = String::from_utf8(log)?;
                let seen: BTreeSet<&str> = log.lines().collect();
                let printed = (1..=LINES).map(|line| line.to_string());
                lost[index] += printed.filter(|line| !seen.contains(&**line)).count();
            }
        }
    }
    let [own, other] = lost;
    Ok([
        against(
            "batch job: thirty dispatched at once, to the last Terminated",
            "ms",
            &samples,
            0.7,
        ),
        json!({
            "name": format!("lines lost of {}", 3 * 30 * LINES), "unit": "lines", "n": 3, "value": own,
            "bound": format!("0; {other} with Nomad's Docker driver"), "holds": own == 0,
        }),
    ])
}

/// Calls of Docker's API from the request to start a task until it has started.
fn calls(nomad: &Nomad, proxy: &DockerProxy) -> Value {
    let _of_earlier_tasks = proxy.take();
    nomad.submit(&service("calls", shell("sleep 1000000")));
    nomad.wait_started("calls");
    // The check of dockerd's health, every two seconds, may fall in between.
    let mut calls = proxy.take();
    calls.retain(|call| !call.ends_with("/info"));
    nomad.run(&["job", "stop", "-purge", "-yes", "calls"]);
    json!({
        "name": "Docker API calls of a start", "unit": "calls", "n": 1, "value": calls.len(),
        "bound": format!("3; they are {}", calls.join(", ")), "holds": calls.len() <= 3,
    })
}

/// Waits until the task of a dispatched job has ended, and returns its allocation. Sends few
/// requests, because requests use the measured CPU.
fn ended(nomad: &Nomad, job: &str) -> Value {
    // An unescaped slash would be part of the path.
    let path = format!("/v1/job/{}/allocations", job.replace('/', "%2F"));
    let mut index = 0;
    loop {
        let allocations = nomad.get(&format!("{path}?wait=60s&index={index}"));
        let alloc = &allocations[0];
        if alloc["TaskStates"]["task"]["State"] == "dead" {
            return alloc.clone();
        }
        // There is no allocation yet: the next answer comes with the first change.
        index = alloc["ModifyIndex"].as_u64().unwrap_or(index).max(1);
    }
}
