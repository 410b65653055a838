//! One shim in front of a large cluster. The drivers and Nomad are simulated; the drivers use the
//! real node API. They share this machine's cores with the callers and the shim.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use futures_util::{Stream, StreamExt, stream};
use polydev_client::Address;
use polydev_proto::runtime::{
    RunRequest, RunResponse, run_event::Event, run_request,
    runtime_service_client::RuntimeServiceClient,
};
use polydev_tests::{
    client::argv,
    fake_node::{FakeNode, Options},
    fake_nomad::FakeNomad,
    shim::Shim,
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tonic::Streaming;

use super::{Summary, millis};

const NODES: usize = 1000;
const SLOTS: usize = 50;
/// Callers at the same time, each with one run after the other.
const CALLERS: usize = 16;
const MEASURED: Duration = Duration::from_secs(10);
/// Runs at the same time that print nothing.
const STREAMS: usize = 1000;
/// The program of these simulated runs.
const WAIT: &str = "wait";
/// The time from a run's end until its slot is idle again.
const REFILL: Duration = Duration::from_millis(400);

pub(super) fn figures() -> anyhow::Result<Vec<Value>> {
    let runtime = Runtime::new()?;
    let folder = tempfile::tempdir()?;
    let nomad = runtime.block_on(async { cluster(folder.path(), NODES, SLOTS, REFILL) })?;
    let began = Instant::now();
    let shim = Shim::serve(&nomad.address);
    let idle = u32::try_from(NODES * SLOTS)?;
    shim.client().wait_idle("anthropic", idle);
    let view = began.elapsed().as_secs_f64();

    let address: Address = shim.address.parse()?;
    let started = Instant::now();
    let mut samples = runtime.block_on(load(&address))?;
    let took = started.elapsed().as_secs_f64();
    samples.sort_by(f64::total_cmp);
    let summary = Summary::of(&samples);
    let rate = samples.len() as f64 / took;
    let memory = resident(&shim)?;
    let open = runtime.block_on(streams(&address))?;
    let each = (resident(&shim)? - memory) / STREAMS as f64 / 1e3;
    drop(open);
    let memory = memory / 1e6;
    Ok(vec![
        json!({
            "name": "claims a second, one shim, 1,000 nodes with 50 slots each", "unit": "1/s",
            "n": samples.len(), "value": rate, "bound": ">= 2000", "holds": rate >= 2000.0,
        }),
        json!({
            "name": "request to the command's start meanwhile", "unit": "ms", "n": samples.len(),
            "p50": summary.p50, "p90": summary.p90, "p99": summary.p99,
            "bound": "p99 <= 20 ms", "holds": summary.p99 <= 20.0,
        }),
        json!({
            "name": "shim, resident with 50,000 slots", "unit": "MB", "n": 1, "value": memory,
            "bound": "<= 300 MB", "holds": memory <= 300.0,
        }),
        json!({
            "name": "shim's start to a view of all 50,000 slots", "unit": "s", "n": 1,
            "value": view, "bound": "<= 5 s", "holds": view <= 5.0,
        }),
        json!({
            "name": "what each of 1,000 open streams adds to it", "unit": "kB", "n": STREAMS,
            "value": each, "bound": "<= 65.5 kB", "holds": each <= 65.5,
        }),
    ])
}

/// Bytes.
fn resident(shim: &Shim) -> anyhow::Result<f64> {
    let process = procfs::process::Process::new(shim.process.pid().as_raw())?;
    Ok((process.stat()?.rss * procfs::page_size()) as f64)
}

/// Milliseconds from each request to its command's start.
async fn load(address: &Address) -> anyhow::Result<Vec<f64>> {
    let end = Instant::now() + MEASURED;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..CALLERS {
        let channel = address.connect(None, |endpoint| endpoint).await;
        let channel = channel.map_err(|error| anyhow::anyhow!("{error}"))?;
        let mut shim = RuntimeServiceClient::new(channel);
        callers.spawn(async move {
            let mut samples = Vec::new();
            while Instant::now() < end {
                samples.push(run(&mut shim).await?);
            }
            anyhow::Ok(samples)
        });
    }
    let mut samples = Vec::new();
    while let Some(caller) = callers.join_next().await {
        samples.extend(caller??);
    }
    Ok(samples)
}

/// Opens runs that do not end, and waits until their commands have started.
async fn streams(address: &Address) -> anyhow::Result<Vec<Streaming<RunResponse>>> {
    let mut open = Vec::new();
    for _ in 0..CALLERS {
        let channel = address.connect(None, |endpoint| endpoint).await;
        let channel = channel.map_err(|error| anyhow::anyhow!("{error}"))?;
        let mut shim = RuntimeServiceClient::new(channel);
        for _ in 0..STREAMS.div_ceil(CALLERS).min(STREAMS - open.len()) {
            let mut events = shim.run(request(WAIT)).await?.into_inner();
            loop {
                let event = events.message().await?.context("the stream ended")?;
                if let Some(Event::Started(_)) = event.event.and_then(|event| event.event) {
                    break;
                }
            }
            open.push(events);
        }
    }
    Ok(open)
}

/// A run of `program`, whose caller sends nothing more.
fn request(program: &str) -> impl Stream<Item = RunRequest> + Send + 'static {
    let start = argv("anthropic", &[program]);
    let start = run_request::Message::Start(Box::new(start));
    let message = Some(start);
    stream::iter([RunRequest { message }]).chain(stream::pending())
}

/// Milliseconds from the request to the command's start, of a run to its end.
pub(super) async fn run(
    shim: &mut RuntimeServiceClient<tonic::transport::Channel>,
) -> anyhow::Result<f64> {
    let sent = Instant::now();
    let mut events = shim.run(request("true")).await?.into_inner();
    let mut started = None;
    while let Some(response) = events.message().await? {
        match response.event.and_then(|event| event.event) {
            Some(Event::Started(_)) => started = Some(millis(sent.elapsed())),
            Some(Event::Exited(_)) => return started.context("it ended before it began"),
            _ => {}
        }
    }
    bail!("the stream ended before the run")
}

/// Starts so many nodes with so many slots each, and a Nomad that knows all nodes.
pub(super) fn cluster(
    folder: &Path,
    nodes: usize,
    slots: usize,
    refill: Duration,
) -> anyhow::Result<FakeNomad> {
    let nomad = FakeNomad::start()?;
    let mut descriptions = Vec::new();
    for number in 0..nodes {
        let options = Options {
            id: format!("{number:08}-0000-4000-8000-000000000000"),
            refill,
            keeps: false,
            ..Options::default()
        };
        let node = FakeNode::start(folder, options)?;
        node.add_slots("anthropic", slots);
        descriptions.push(node.description());
    }
    nomad.set_nodes(descriptions);
    Ok(nomad)
}
