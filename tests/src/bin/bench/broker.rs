//! What the broker adds to a model request: the same requests straight to a server of our own,
//! and through the real broker.

use std::{
    convert::Infallible,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use axum::{Router, body::Body, routing::post};
use bytes::Bytes;
use futures_util::{StreamExt, future::try_join_all, stream};
use polydev_driver::broker::{self, Broker, Opened};
use polydev_proto::{
    broker::{Key, Keys, Open, Upstream},
    id::RunId,
    sealed::seal_keys,
};
use procfs::process::{Process, all_processes};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    net::TcpListener,
    task::JoinHandle,
    time::{interval, timeout},
};

use super::{Summary, millis, resident};

const FAST: u64 = 1 << 40;
const UID: u32 = 66_319;
/// Requests a second, and for how long in each of the rounds.
const RATE: u32 = 500;
const ROUND: Duration = Duration::from_secs(4);
const ROUNDS: usize = 4;
/// A prompt of a CLI, and a short answer.
const REQUEST: usize = 4096;
const ANSWER: usize = 2048;
const CHUNK: usize = 64 << 10;
const STREAMED: usize = 1 << 30;
const STREAMS: usize = 1000;
/// A broker takes 128 connections from one container.
const STREAMS_OF_ONE: usize = 100;

pub(super) fn figures() -> anyhow::Result<Vec<Value>> {
    tokio::runtime::Runtime::new()?.block_on(measure())
}

async fn measure() -> anyhow::Result<Vec<Value>> {
    let _installed = rustls::crypto::ring::default_provider().install_default();
    let api = serve().await?;
    let node = Node::start(api).await?;
    let idle = resident(node.pid.into())?;
    let through = node.container("one").await?;
    let mut figures = vec![latencies(api, through.address).await?];
    figures.push(first_bytes(api, through.address).await?);
    figures.push(throughput(api, through.address, node.pid).await?);
    figures.extend(memory(&node, idle).await?);
    Ok(figures)
}

/// A model API: a whole answer, a stream that goes on, and a long answer in chunks.
async fn serve() -> anyhow::Result<SocketAddr> {
    let whole = async |_request: Bytes| vec![b'x'; ANSWER];
    let endless = async |_request: Bytes| {
        let first =
            stream::once(async { Ok::<_, Infallible>(Bytes::from_static(b"data: {}\n\n")) });
        Body::from_stream(first.chain(stream::pending()))
    };
    let long = async |_request: Bytes| {
        let chunk = Bytes::from(vec![b'x'; CHUNK]);
        let chunks = (0..STREAMED / CHUNK).map(move |_| Ok::<_, Infallible>(chunk.clone()));
        Body::from_stream(stream::iter(chunks))
    };
    let api = Router::new()
        .route("/v1/messages", post(whole))
        .route("/v1/messages/count_tokens", post(endless))
        .route("/v1/models", post(long));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, api).await });
    Ok(address)
}

/// A broker as a driver keeps it.
struct Node {
    broker: Arc<Broker>,
    keeps: JoinHandle<()>,
    pid: i32,
    api: SocketAddr,
    _folder: TempDir,
}

struct Container {
    address: SocketAddr,
    _opened: Opened,
}

impl Node {
    async fn start(api: SocketAddr) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let broker = Broker::new();
        let program = polydev_tests::program("polydev-broker");
        let changed = tokio::sync::watch::Sender::new(0);
        let mut changes = changed.subscribe();
        let state_dir = folder.path().to_owned();
        let kept = broker::keep(broker.clone(), program, state_dir, UID, changed, |_seen| {});
        let keeps = tokio::spawn(kept);
        timeout(Duration::from_secs(10), changes.changed()).await??;
        let is_ours = |process: &Process| {
            let command = process.cmdline().unwrap_or_default();
            process
                .stat()
                .is_ok_and(|stat| stat.ppid.cast_unsigned() == std::process::id())
                && command
                    .first()
                    .is_some_and(|name| name.ends_with("polydev-broker"))
        };
        let mut processes = all_processes()?.flatten();
        let pid = processes.find(is_ours).context("the broker runs")?.pid;
        Ok(Self {
            broker,
            keeps,
            pid,
            api,
            _folder: folder,
        })
    }

    /// A container with a run in it.
    async fn container(&self, name: &str) -> anyhow::Result<Container> {
        let socket = std::net::TcpListener::bind("127.0.0.1:0")?;
        let address = socket.local_addr()?;
        let upstream = Upstream {
            provider: "anthropic".into(),
            base_url: format!("http://{}", self.api),
            ..Upstream::default()
        };
        let open = Open {
            container: name.to_owned(),
            bytes_per_second: FAST,
            upstreams: vec![upstream],
            ..Open::default()
        };
        let opened = self.broker.open(open, OwnedFd::from(socket));
        let key = Key {
            provider: "anthropic".into(),
            value: polydev_tests::fresh_key().into_bytes().into(),
        };
        let run_id = RunId::new(std::time::SystemTime::now(), rand::random());
        let keys = Keys { keys: vec![key] };
        let sealed = seal_keys(&self.broker.public_key(), &run_id.to_string(), &keys)?;
        let granting = opened.grant(run_id, sealed, None, FAST);
        granting.context("the run has a key")?.done().await?;
        Ok(Container {
            address,
            _opened: opened,
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.keeps.abort();
        let _gone = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.pid),
            nix::sys::signal::Signal::SIGTERM,
        );
    }
}

fn url(address: SocketAddr, path: &str, is_through: bool) -> String {
    let prefix = if is_through { "/anthropic" } else { "" };
    format!("http://{address}{prefix}{path}")
}

/// Milliseconds of each request, sent at the rate whatever the answers do.
async fn load(url: String) -> anyhow::Result<Vec<f64>> {
    let client = reqwest::Client::new();
    let mut ticks = interval(Duration::from_secs(1) / RATE);
    let begin = Instant::now();
    let mut asked = Vec::new();
    while begin.elapsed() < ROUND {
        ticks.tick().await;
        let request = client.post(&url).body(vec![b'x'; REQUEST]);
        asked.push(tokio::spawn(async move {
            let sent = Instant::now();
            let answer = request.send().await?.error_for_status()?.bytes().await?;
            ensure!(answer.len() == ANSWER, "{} bytes came", answer.len());
            Ok(millis(sent.elapsed()))
        }));
    }
    let mut samples = Vec::new();
    for answer in asked {
        samples.push(answer.await??);
    }
    Ok(samples)
}

async fn latencies(api: SocketAddr, through: SocketAddr) -> anyhow::Result<Value> {
    let (mut direct, mut brokered) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        direct.extend(load(url(api, "/v1/messages", false)).await?);
        brokered.extend(load(url(through, "/v1/messages", true)).await?);
    }
    let (ours, theirs) = (Summary::of(&brokered), Summary::of(&direct));
    let (p50, p99) = (ours.p50 - theirs.p50, ours.p99 - theirs.p99);
    Ok(json!({
        "name": format!("a request through the broker, {RATE} a second"),
        "unit": "ms", "n": brokered.len(),
        "p50": ours.p50, "p90": ours.p90, "p99": ours.p99,
        "against": {
            "name": "the same straight to the server", "unit": "ms", "n": direct.len(),
            "p50": theirs.p50, "p90": theirs.p90, "p99": theirs.p99,
        },
        "bound": format!("added p50 <= 0.3 ms ({p50:.2}), added p99 <= 1 ms ({p99:.2})"),
        "holds": p50 <= 0.3 && p99 <= 1.0,
    }))
}

/// Milliseconds until the first byte of a stream, on a connection that is there already.
async fn first_bytes(api: SocketAddr, through: SocketAddr) -> anyhow::Result<Value> {
    const SAMPLES: usize = 200;
    let mut sides = [Vec::new(), Vec::new()];
    for _ in 0..SAMPLES {
        for (samples, (address, is_through)) in
            sides.iter_mut().zip([(api, false), (through, true)])
        {
            let client = reqwest::Client::new();
            let warm = client
                .post(url(address, "/v1/messages", is_through))
                .body("x");
            warm.send().await?.bytes().await?;
            let sent = Instant::now();
            let path = "/v1/messages/count_tokens";
            let asked = client.post(url(address, path, is_through)).body("x");
            let mut answer = asked.send().await?.error_for_status()?;
            answer.chunk().await?.context("a first piece")?;
            samples.push(millis(sent.elapsed()));
        }
    }
    let [theirs, ours] = sides.map(|samples| Summary::of(&samples));
    let added = ours.p50 - theirs.p50;
    Ok(json!({
        "name": "first byte of a stream through the broker", "unit": "ms", "n": SAMPLES,
        "p50": ours.p50, "p90": ours.p90, "p99": ours.p99,
        "against": {
            "name": "straight from the server", "unit": "ms", "n": SAMPLES,
            "p50": theirs.p50, "p90": theirs.p90, "p99": theirs.p99,
        },
        "bound": format!("added p50 <= 1 ms ({added:.2})"),
        "holds": added <= 1.0,
    }))
}

/// What one core moves: the transfer straight from the server keeps this process busy, the one
/// through the broker the broker too.
async fn throughput(api: SocketAddr, through: SocketAddr, pid: i32) -> anyhow::Result<Value> {
    const SAMPLES: usize = 3;
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..SAMPLES {
        let before = cpu(std::process::id().cast_signed())?;
        fetch(url(api, "/v1/models", false)).await?;
        rates[0].push(mb_per_second(
            cpu(std::process::id().cast_signed())? - before,
        ));
        let before = cpu(pid)?;
        fetch(url(through, "/v1/models", true)).await?;
        rates[1].push(mb_per_second(cpu(pid)? - before));
    }
    let [theirs, ours] = rates.map(|samples| Summary::of(&samples).p50);
    let ratio = ours / theirs;
    Ok(json!({
        "name": "64 KiB chunks, for each core that the broker uses",
        "unit": "MB/s", "n": SAMPLES, "value": ours,
        "against": {
            "name": "straight, for each core that client and server use", "unit": "MB/s",
            "n": SAMPLES, "value": theirs,
        },
        "ratio": ratio, "bound": "ratio >= 0.8", "holds": ratio >= 0.8,
    }))
}

#[expect(clippy::cast_precision_loss, reason = "a gigabyte is exact")]
fn mb_per_second(took: Duration) -> f64 {
    STREAMED as f64 / 1e6 / took.as_secs_f64()
}

async fn fetch(url: String) -> anyhow::Result<()> {
    let mut answer = reqwest::Client::new().post(url).body("x").send().await?;
    let mut got = 0;
    while let Some(piece) = answer.chunk().await? {
        got += piece.len();
    }
    ensure!(got == STREAMED, "{got} bytes came");
    Ok(())
}

/// The time that a process has run on a core.
fn cpu(pid: i32) -> anyhow::Result<Duration> {
    let stat = Process::new(pid)?.stat()?;
    let ticks = u32::try_from(stat.utime + stat.stime)?;
    let a_second = u32::try_from(procfs::ticks_per_second())?;
    Ok(Duration::from_secs(1) * ticks / a_second)
}

async fn memory(node: &Node, idle: f64) -> anyhow::Result<Vec<Value>> {
    let mut containers = Vec::new();
    for number in 0..STREAMS / STREAMS_OF_ONE {
        containers.push(node.container(&format!("many-{number}")).await?);
    }
    let without = resident(node.pid.into())?;
    let open = |address: SocketAddr| async move {
        let path = "/v1/messages/count_tokens";
        let asked = reqwest::Client::new()
            .post(url(address, path, true))
            .body("x");
        let mut answer = asked.send().await?.error_for_status()?;
        answer.chunk().await?.context("a first piece")?;
        anyhow::Ok(answer)
    };
    let addresses = containers.iter().map(|container| container.address);
    let all = addresses.flat_map(|address| std::iter::repeat_n(address, STREAMS_OF_ONE));
    let streams = try_join_all(all.map(open)).await?;
    let with = resident(node.pid.into())?;
    #[expect(clippy::cast_precision_loss, reason = "a thousand is exact")]
    let each = (with - without) * 1e6 / 1024.0 / streams.len() as f64;
    Ok(vec![
        json!({
            "name": "broker, resident without a container", "unit": "MB", "n": 1, "value": idle,
            "bound": "<= 15 MB", "holds": idle <= 15.0,
        }),
        json!({
            "name": format!("broker, for each of {STREAMS} open streams"), "unit": "KiB",
            "n": streams.len(), "value": each, "bound": "<= 48 KiB", "holds": each <= 48.0,
        }),
    ])
}
