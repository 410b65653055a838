//! Plain tasks against Nomad's own Docker driver, on the same agent with the same image.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, ensure};
use polydev_tests::{
    docker,
    job::{batch, merge, service, shell, task},
    nomad::Nomad,
    wait_until,
};
use serde_json::{Value, json};

use super::{Summary, resident};

const STARTS: usize = 30;
const ROUNDS: usize = 8;
const TASKS: usize = 20;
const DRIVERS: [&str; 2] = ["polydev", "docker"];

/// Every figure of plain tasks.
pub(super) fn figures() -> anyhow::Result<Vec<Value>> {
    let nomad = Nomad::start_beside_docker();
    for driver in DRIVERS {
        let mut job = batch(&format!("start-{driver}"), shell("true"));
        job["ParameterizedJob"] = json!({ "Payload": "forbidden" });
        merge(
            task(&mut job),
            json!({ "Driver": driver, "Resources": { "CPU": 20, "MemoryMB": 16 } }),
        );
        nomad.submit(&job);
    }
    let mut figures = vec![
        starts(&nomad, "dispatch to Started", STARTS, 1)?,
        starts(
            &nomad,
            "eight at once, dispatch to the last Started",
            ROUNDS,
            8,
        )?,
        logs(&nomad)?,
        memory(&nomad)?,
    ];
    for mbits in [1, 5, 10, 100, 1000] {
        figures.extend(bandwidth(&nomad, mbits)?);
    }
    Ok(figures)
}

/// Milliseconds from the dispatch of `at_once` jobs until the last of their tasks has started.
fn starts(nomad: &Nomad, name: &str, rounds: usize, at_once: usize) -> anyhow::Result<Value> {
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (driver, samples) in DRIVERS.iter().zip(&mut samples) {
            let begin = SystemTime::now();
            let jobs: Vec<String> = (0..at_once)
                .map(|_| {
                    let path = format!("/v1/job/start-{driver}/dispatch");
                    let answer = nomad.put(&path, &json!({}));
                    answer["DispatchedJobID"]
                        .as_str()
                        .unwrap_or_default()
                        .to_owned()
                })
                .collect();
            let mut last = 0;
            for job in &jobs {
                // A slash would be one of the path.
                let alloc = nomad.wait_dead(&job.replace('/', "%2F"));
                last = last.max(event(&alloc, "Started").context("a started task says so")?);
            }
            samples.push(since(begin, last));
        }
    }
    Ok(against(&format!("batch job: {name}"), "ms", &samples, 0.8))
}

/// Milliseconds for a task that prints 100 MB.
fn logs(nomad: &Nomad) -> anyhow::Result<Value> {
    let mut samples = [Vec::new(), Vec::new()];
    for round in 0..3 {
        for (driver, samples) in DRIVERS.iter().zip(&mut samples) {
            let id = format!("logs-{driver}-{round}");
            let mut job = batch(&id, shell("head -c 100000000 /dev/zero | tr '\\0' '\\n'"));
            task(&mut job)["Driver"] = json!(driver);
            task(&mut job)["Resources"]["CPU"] = 1000.into();
            nomad.submit(&job);
            let alloc = nomad.wait_dead(&id);
            let begin = event(&alloc, "Started").context("a started task says so")?;
            let end = event(&alloc, "Terminated").context("an ended task says so")?;
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
        1.1,
    ))
}

/// Kilobytes of the driver's own memory for each task.
fn memory(nomad: &Nomad) -> anyhow::Result<Value> {
    let pid = || -> anyhow::Result<i64> {
        let lock = fs::read_to_string(nomad.state_dir().join("driver.lock"))?;
        Ok(lock.trim().parse()?)
    };
    let before = resident(pid()?)?;
    let mut job = service("many", shell("sleep 1000000"));
    job["TaskGroups"][0]["Count"] = TASKS.into();
    merge(
        task(&mut job),
        json!({ "Resources": { "CPU": 20, "MemoryMB": 16 } }),
    );
    nomad.submit(&job);
    nomad.wait_running("many", TASKS);
    #[expect(clippy::cast_precision_loss, reason = "a few tasks")]
    let each = (resident(pid()?)? - before).max(0.0) * 1000.0 / TASKS as f64;
    nomad.run(&["job", "stop", "-purge", "-yes", "many"]);
    Ok(json!({
        "name": format!("driver, resident for each of {TASKS} plain tasks"),
        "unit": "kB", "n": TASKS, "value": each, "bound": "<= 300 kB", "holds": each <= 300.0,
    }))
}

/// Megabits a second that pass a limit of `mbits`, each way, over two seconds and more.
fn bandwidth(nomad: &Nomad, mbits: u32) -> anyhow::Result<Vec<Value>> {
    let bytes = usize::try_from(mbits)? * 125_000 * 3;
    let id = format!("rate-{mbits}");
    let script =
        format!("nc -ll -p 9000 -e wc -c & nc -ll -p 9001 -e head -c {bytes} /dev/zero & wait");
    let mut config = shell(&script);
    let limits = json!({ "egress_mbits": mbits, "ingress_mbits": mbits });
    merge(&mut config, json!({ "bandwidth": limits }));
    let mut job = service(&id, config);
    task(&mut job)["Resources"]["CPU"] = 1000.into();
    nomad.submit(&job);
    let alloc = nomad.wait_started(&id);
    let ids = docker::containers(&format!("dev.polydev.alloc_id={alloc}"));
    let container = docker::inspect(ids.first().context("the task has a container")?);
    let address = container["NetworkSettings"]["IPAddress"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let connect = |port: u16| {
        wait_until("the server in the task", Duration::from_secs(10), || {
            TcpStream::connect((&*address, port)).map_err(|error| error.to_string())
        })
    };
    let mut upload = connect(9000);
    let begin = Instant::now();
    upload.write_all(&vec![0; bytes])?;
    upload.shutdown(Shutdown::Write)?;
    let mut count = String::new();
    upload.read_to_string(&mut count)?;
    ensure!(
        count.trim() == bytes.to_string(),
        "the task received {count}"
    );
    let ingress = begin.elapsed();
    let mut download = connect(9001);
    let begin = Instant::now();
    let mut data = Vec::with_capacity(bytes);
    download.read_to_end(&mut data)?;
    ensure!(data.len() == bytes, "the task sent {}", data.len());
    let egress = begin.elapsed();
    nomad.run(&["job", "stop", "-purge", "-yes", &id]);
    #[expect(clippy::cast_precision_loss, reason = "a few hundred million bytes")]
    let rate = |time: Duration| bytes as f64 * 8.0 / 1e6 / time.as_secs_f64();
    let figure = |name: &str, time: Duration| {
        let wanted = f64::from(mbits);
        let rate = rate(time);
        json!({
            "name": format!("{mbits} Mbit/s, {name}"), "unit": "Mbit/s", "n": 1, "value": rate,
            "bound": "within 5 %", "holds": (rate / wanted - 1.0).abs() <= 0.05,
        })
    };
    Ok(vec![
        figure("what the task receives", ingress),
        figure("what it sends", egress),
    ])
}

fn against(name: &str, unit: &str, [ours, theirs]: &[Vec<f64>; 2], most: f64) -> Value {
    let (own, other) = (Summary::of(ours), Summary::of(theirs));
    let ratio = own.p50 / other.p50;
    json!({
        "name": name, "unit": unit, "n": ours.len(), "p50": own.p50, "p90": own.p90, "p99": own.p99,
        "against": {
            "name": "the same with Nomad's Docker driver", "unit": unit, "n": theirs.len(),
            "p50": other.p50, "p90": other.p90, "p99": other.p99,
        },
        "ratio": ratio, "bound": format!("at most {most} times at p50"), "holds": ratio <= most,
    })
}

/// When a task of an allocation had an event, in nanoseconds of Unix time.
fn event(alloc: &Value, kind: &str) -> Option<i64> {
    let events = alloc["TaskStates"]["task"]["Events"].as_array()?;
    let event = events.iter().find(|event| event["Type"] == kind)?;
    event["Time"].as_i64()
}

fn since(begin: SystemTime, nanos: i64) -> f64 {
    let end = SystemTime::UNIX_EPOCH + Duration::from_nanos(u64::try_from(nanos).unwrap_or(0));
    end.duration_since(begin).unwrap_or_default().as_secs_f64() * 1e3
}
