//! What telemetry costs: a warm claim with a collector and without, and the processor time of a shim
//! that sends traces, metrics and log lines of a thousand runs a second.

use std::time::{Duration, Instant};

use anyhow::Context;
use polydev_client::Address;
use polydev_proto::runtime::runtime_service_client::RuntimeServiceClient;
use polydev_tests::{collector::Collector, free_ports, shim::Shim};
use serde_json::{Value, json};
use tokio::{runtime::Runtime, time::interval};

use super::{SAMPLES, Summary, swarm, warm_claim};

const POOL: u32 = 4;
const NODES: usize = 20;
const SLOTS: usize = 50;
/// Callers at the same time, and how many runs each of them starts a second.
const CALLERS: usize = 20;
const EACH_A_SECOND: u32 = 50;
const MEASURED: Duration = Duration::from_secs(12);
/// Time until all is sent: spans and lines after at most five seconds, metrics after ten.
const SENT_AFTER: Duration = Duration::from_secs(11);
/// Rounds without and with, in turn.
const ROUNDS: usize = 3;
/// The time from a run's end until its slot is idle again.
const REFILL: Duration = Duration::from_millis(200);

pub(super) fn figures() -> anyhow::Result<Vec<Value>> {
    let [port] = free_ports();
    let whole = "exporters::file/traces::rotation::max_megabytes: 4096".to_owned();
    let collector = Collector::start_with(port, &[whole]);
    let endpoint = format!("--otlp-endpoint=http://127.0.0.1:{port}");
    let claims = claims(&endpoint)?;
    let before = traced(&collector);
    let (cost, runs) = exporter(&endpoint)?;
    // The last shim has sent what it had when it was stopped.
    let arrived = (traced(&collector) - before) as f64 / runs as f64;
    let arrived = json!({
        "name": "runs whose spans have reached the collector", "unit": "", "n": runs,
        "value": arrived, "bound": ">= 0.99", "holds": arrived >= 0.99,
    });
    Ok(vec![claims, cost, arrived])
}

/// How many runs the collector has the span of.
fn traced(collector: &Collector) -> usize {
    let spans = collector.spans();
    spans.iter().filter(|span| span["name"] == "run").count()
}

fn claims(endpoint: &str) -> anyhow::Result<Value> {
    let pool = format!("anthropic={POOL}");
    let shims = [Shim::dev(&[&pool]), Shim::dev_with(&[&pool], &[endpoint])];
    let clients = [shims[0].client(), shims[1].client()];
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..SAMPLES {
        for (client, samples) in clients.iter().zip(&mut samples) {
            // The machine is idle: all slots of both are warm.
            clients
                .iter()
                .for_each(|client| client.wait_idle("anthropic", POOL));
            samples.push(warm_claim(client)?);
        }
    }
    let [off, on] = samples.map(|samples| Summary::of(&samples));
    let ratio = on.p50 / off.p50;
    Ok(json!({
        "name": "warm claim with telemetry", "unit": "ms", "n": SAMPLES,
        "p50": on.p50, "p90": on.p90, "p99": on.p99,
        "against": {
            "name": "without", "unit": "ms", "n": SAMPLES,
            "p50": off.p50, "p90": off.p90, "p99": off.p99,
        },
        "ratio": ratio, "bound": "ratio <= 1.05", "holds": ratio <= 1.05,
    }))
}

/// Also how many runs were to be traced.
fn exporter(endpoint: &str) -> anyhow::Result<(Value, usize)> {
    let runtime = Runtime::new()?;
    let folder = tempfile::tempdir()?;
    let nomad = runtime.block_on(async { swarm::cluster(folder.path(), NODES, SLOTS, REFILL) })?;
    let idle = u32::try_from(NODES * SLOTS)?;
    let mut used = [Vec::new(), Vec::new()];
    let mut traced = 0;
    for _ in 0..ROUNDS {
        for (options, used) in [&[][..], &[endpoint]].into_iter().zip(&mut used) {
            let shim = Shim::serve_with(&nomad.address, options);
            shim.client().wait_idle("anthropic", idle);
            let address: Address = shim.address.parse()?;
            let (before, began) = (processor(&shim)?, Instant::now());
            let runs = runtime.block_on(load(&address))?;
            std::thread::sleep(SENT_AFTER);
            let (after, took) = (processor(&shim)?, began.elapsed().as_secs_f64());
            used.push((after - before) / runs as f64 * 1e3);
            if !options.is_empty() {
                traced += runs;
            }
            eprintln!("{} runs in {took:.1} s", runs);
        }
    }
    let [off, on] = used.map(|used| Summary::of(&used).p50);
    let share = on - off;
    let figure = json!({
        "name": "what telemetry takes of a core at 1,000 runs a second", "unit": "", "n": traced,
        "value": share,
        "against": { "name": "the shim without", "unit": "", "n": ROUNDS, "value": off },
        "bound": "<= 0.05", "holds": share <= 0.05,
    });
    Ok((figure, traced))
}

/// Seconds of processor time of the shim.
fn processor(shim: &Shim) -> anyhow::Result<f64> {
    let process = procfs::process::Process::new(shim.process.pid().as_raw())?;
    let stat = process.stat()?;
    Ok((stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64)
}

/// How many runs there were.
async fn load(address: &Address) -> anyhow::Result<usize> {
    let end = Instant::now() + MEASURED;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..CALLERS {
        let channel = address.connect(None, |endpoint| endpoint).await;
        let channel = channel.map_err(|error| anyhow::anyhow!("{error}"))?;
        let mut shim = RuntimeServiceClient::new(channel);
        callers.spawn(async move {
            let mut ticks = interval(Duration::from_secs(1) / EACH_A_SECOND);
            let mut runs = 0;
            while Instant::now() < end {
                ticks.tick().await;
                swarm::run(&mut shim).await?;
                runs += 1;
            }
            anyhow::Ok(runs)
        });
    }
    let mut runs = 0;
    while let Some(caller) = callers.join_next().await {
        runs += caller.context("a caller panicked")??;
    }
    Ok(runs)
}
