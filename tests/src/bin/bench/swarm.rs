//! One shim in front of a large cluster: its drivers are simulated, over the real node API,
//! and so is what Nomad tells of them. Both, the callers and the shim share this machine's
//! cores.

use std::{
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, bail};
use axum::{
    Json, Router,
    extract::{Query, State},
    response::{AppendHeaders, IntoResponse, Response as HttpResponse},
    routing::get,
};
use futures_util::{Stream, StreamExt, stream};
use polydev_proto::{
    node::{
        self, AttachRequest, AttachResponse, Attached, CancelRunRequest, CancelRunResponse,
        ClaimRequest, ClaimResponse, Ended, FenceRequest, FenceResponse, GetNodeRequest,
        GetNodeResponse, GetRunRequest, GetRunResponse, Granted, LeaseRequest, LeaseResponse,
        ListRunsRequest, ListRunsResponse, ReleaseRequest, ReleaseResponse, RunEvent, Slot,
        Started, WatchRefreshedRequest, WatchRefreshedResponse, WatchRunsRequest,
        WatchRunsResponse, WatchSlotsRequest, WatchSlotsResponse, claim_request, ended,
        node_service_server::{NodeService, NodeServiceServer},
        run_event, slot,
    },
    runtime::{
        RunRequest, RunResponse, run_event::Event, run_request,
        runtime_service_client::RuntimeServiceClient,
    },
};
use polydev_tests::{client::argv, shim::Shim};
use polydev_transport::address::Address;
use prost_types::Timestamp;
use serde_json::{Value, json};
use tokio::{net::UnixListener, runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::{Summary, millis};

const NODES: usize = 1000;
const SLOTS: usize = 50;
/// Callers at a time, each with one run after the other.
const CALLERS: usize = 16;
const MEASURED: Duration = Duration::from_secs(10);
/// Runs that go on at the same time, and say nothing.
const STREAMS: usize = 1000;
/// What a simulated run is asked to do for that.
const WAIT: &str = "wait";
/// From a run's end until its slot is idle again.
const REFILL: Duration = Duration::from_millis(400);

pub(super) fn figures() -> anyhow::Result<Vec<Value>> {
    let runtime = Runtime::new()?;
    let folder = tempfile::tempdir()?;
    let nomad = runtime.block_on(cluster(folder.path()))?;
    let began = Instant::now();
    let shim = Shim::serve(&nomad);
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

/// A run of `program`, whose caller says no more.
fn request(program: &str) -> impl Stream<Item = RunRequest> + Send + 'static {
    let start = argv("anthropic", &[program]);
    let start = run_request::Message::Start(Box::new(start));
    let message = Some(start);
    stream::iter([RunRequest { message }]).chain(stream::pending())
}

async fn run(shim: &mut RuntimeServiceClient<tonic::transport::Channel>) -> anyhow::Result<f64> {
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

/// Starts every node, and what Nomad says of them; where that is asked.
async fn cluster(folder: &Path) -> anyhow::Result<String> {
    let mut nodes = Vec::new();
    for number in 0..NODES {
        let id = format!("{number:08}-0000-4000-8000-000000000000");
        let socket = folder.join(format!("{number}.sock"));
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket)?);
        let service = NodeServiceServer::from_arc(Arc::new(Node::new(&id)));
        tokio::spawn(
            Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming),
        );
        nodes.push(told(&id, &socket));
    }
    let router = Router::new()
        .route("/v1/nodes", get(list))
        .with_state(Arc::new(Value::from(nodes)));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = format!("http://{}", listener.local_addr()?);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(address)
}

fn told(id: &str, socket: &Path) -> Value {
    let address = format!("unix://{}", socket.display());
    json!({
        "ID": id,
        "Status": "ready",
        "Drivers": { "polydev": { "Attributes": { "driver.polydev.node_address": address } } },
    })
}

#[derive(serde::Deserialize)]
struct Index {
    #[serde(default)]
    index: u64,
}

/// Nothing ever changes: whoever asks again waits.
async fn list(
    State(nodes): State<Arc<Value>>,
    Query(Index { index }): Query<Index>,
) -> HttpResponse {
    if index > 0 {
        std::future::pending::<()>().await;
    }
    (AppendHeaders([("X-Nomad-Index", "1")]), Json(&*nodes)).into_response()
}

/// A driver whose commands end at once.
struct Node {
    slots: Arc<Slots>,
}

struct Slots {
    all: Mutex<Vec<Slot>>,
    /// To the one shim that watches.
    watcher: Mutex<Option<mpsc::Sender<Slot>>>,
}

impl Node {
    fn new(id: &str) -> Self {
        let slot = |number| Slot {
            slot_id: format!("{id}/{number:08}-1111-4111-8111-111111111111"),
            provider: "anthropic".into(),
            image: "polydev-anthropic-runtime:latest".into(),
            state: slot::State::Idle.into(),
            generation: 1,
            since: Some(Timestamp::from(SystemTime::now())),
            namespace: "default".into(),
            job_id: "polydev-pool-anthropic".into(),
            alloc_id: format!("{number:08}-1111-4111-8111-111111111111"),
            public_key: vec![7; 32].into(),
            ..Slot::default()
        };
        Self {
            slots: Arc::new(Slots {
                all: Mutex::new((0..SLOTS).map(slot).collect()),
                watcher: Mutex::default(),
            }),
        }
    }
}

impl Slots {
    /// Changes a slot, and tells of it.
    fn change(&self, slot_id: &str, change: impl FnOnce(&mut Slot) -> bool) -> bool {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = all.iter_mut().find(|slot| slot.slot_id == slot_id);
        let Some(slot) = slot else {
            return false;
        };
        if !change(slot) {
            return false;
        }
        let watcher = self.watcher.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(watcher) = &*watcher {
            let _slow = watcher.try_send(slot.clone());
        }
        true
    }
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn event<T>(event: run_event::Event, wrap: fn(Option<RunEvent>) -> T) -> Result<T, Status> {
    Ok(wrap(Some(RunEvent { event: Some(event) })))
}

#[tonic::async_trait]
impl NodeService for Node {
    type WatchSlotsStream = Responses<WatchSlotsResponse>;
    type ClaimStream = Responses<ClaimResponse>;
    type AttachStream = Responses<AttachResponse>;
    type WatchRunsStream = Responses<WatchRunsResponse>;
    type WatchRefreshedStream = Responses<WatchRefreshedResponse>;

    async fn watch_slots(
        &self,
        _: Request<WatchSlotsRequest>,
    ) -> Result<Response<Self::WatchSlotsStream>, Status> {
        let told = |snapshot, slots| WatchSlotsResponse {
            start_id: "start".into(),
            now: Some(Timestamp::from(SystemTime::now())),
            snapshot,
            slots,
            removed: Vec::new(),
            since: None,
        };
        let (watcher, changes) = mpsc::channel(1024);
        let all = self.slots.all.lock();
        let all = all.unwrap_or_else(PoisonError::into_inner).clone();
        let mut watching = self
            .slots
            .watcher
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *watching = Some(watcher);
        let first = stream::iter([Ok(told(true, all))]);
        let rest = ReceiverStream::new(changes).map(move |slot| Ok(told(false, vec![slot])));
        Ok(Response::new(Box::pin(first.chain(rest))))
    }

    async fn claim(
        &self,
        request: Request<Streaming<ClaimRequest>>,
    ) -> Result<Response<Self::ClaimStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|first| first.message);
        let Some(claim_request::Message::Claim(claim)) = first else {
            return Err(Status::invalid_argument("no claim"));
        };
        let granted = self.slots.change(&claim.slot_id, |slot| {
            let is_idle = slot.state() == slot::State::Idle && slot.generation == claim.generation;
            if is_idle {
                slot.set_state(slot::State::Claimed);
                slot.run_id.clone_from(&claim.run_id);
            }
            is_idle
        });
        if !granted {
            return Err(Status::failed_precondition("the slot is not idle"));
        }
        let program = claim.spec.as_ref().and_then(|spec| spec.argv.first());
        let waits = program.is_some_and(|program| *program == WAIT);
        let (slots, slot_id) = (self.slots.clone(), claim.slot_id.clone());
        tokio::spawn(async move {
            if waits {
                return;
            }
            tokio::time::sleep(REFILL).await;
            slots.change(&slot_id, |slot| {
                slot.set_state(slot::State::Idle);
                slot.run_id.clear();
                slot.generation += 1;
                true
            });
        });
        let wrap = |event| ClaimResponse { event };
        let attached = Attached {
            slot_id: claim.slot_id,
            generation: claim.generation,
            ..Attached::default()
        };
        let ended = Ended {
            reason: ended::Reason::Exited.into(),
            ..Ended::default()
        };
        let events = [
            event(run_event::Event::Attached(attached), wrap),
            event(run_event::Event::Granted(Granted::default()), wrap),
            event(run_event::Event::Started(Started::default()), wrap),
            event(run_event::Event::Ended(ended), wrap),
        ];
        if waits {
            let events = events.into_iter().take(3);
            let events = stream::iter(events).chain(stream::pending());
            return Ok(Response::new(Box::pin(events)));
        }
        Ok(Response::new(Box::pin(stream::iter(events))))
    }

    async fn attach(
        &self,
        _: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        Err(Status::not_found("nothing is kept"))
    }

    async fn cancel_run(
        &self,
        _: Request<CancelRunRequest>,
    ) -> Result<Response<CancelRunResponse>, Status> {
        Err(Status::not_found("nothing is kept"))
    }

    async fn get_run(&self, _: Request<GetRunRequest>) -> Result<Response<GetRunResponse>, Status> {
        Err(Status::not_found("nothing is kept"))
    }

    async fn list_runs(
        &self,
        _: Request<ListRunsRequest>,
    ) -> Result<Response<ListRunsResponse>, Status> {
        Ok(Response::new(ListRunsResponse::default()))
    }

    async fn watch_runs(
        &self,
        _: Request<WatchRunsRequest>,
    ) -> Result<Response<Self::WatchRunsStream>, Status> {
        Ok(Response::new(Box::pin(futures_util::stream::pending())))
    }

    async fn watch_refreshed(
        &self,
        _: Request<WatchRefreshedRequest>,
    ) -> Result<Response<Self::WatchRefreshedStream>, Status> {
        Ok(Response::new(Box::pin(futures_util::stream::pending())))
    }

    async fn fence(&self, _: Request<FenceRequest>) -> Result<Response<FenceResponse>, Status> {
        let answer = node::fence_response::Answer::Unknown(node::Unknown::default());
        Ok(Response::new(FenceResponse {
            answer: Some(answer),
            claims_on: Vec::new(),
        }))
    }

    async fn lease(&self, _: Request<LeaseRequest>) -> Result<Response<LeaseResponse>, Status> {
        Err(Status::failed_precondition("no leases"))
    }

    async fn release(
        &self,
        _: Request<ReleaseRequest>,
    ) -> Result<Response<ReleaseResponse>, Status> {
        Err(Status::not_found("no leases"))
    }

    async fn get_node(
        &self,
        _: Request<GetNodeRequest>,
    ) -> Result<Response<GetNodeResponse>, Status> {
        Ok(Response::new(GetNodeResponse::default()))
    }
}
