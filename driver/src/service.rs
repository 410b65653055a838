//! The RPCs of a Nomad task driver: decode, ask the book and the slots, encode.

mod error;
mod stats;

use std::{pin::Pin, sync::Arc, time::SystemTime};

use futures_util::{Stream, StreamExt};
use polydev_proto::{
    driver::{
        CapabilitiesRequest, CapabilitiesResponse, CreateNetworkRequest, CreateNetworkResponse,
        DestroyNetworkRequest, DestroyNetworkResponse, DestroyTaskRequest, DestroyTaskResponse,
        DriverCapabilities, DriverTaskEvent, ExecTaskRequest, ExecTaskResponse,
        ExecTaskStreamingRequest, ExecTaskStreamingResponse, ExitResult, FingerprintRequest,
        FingerprintResponse, InitRequest, InitResponse, InspectTaskRequest, InspectTaskResponse,
        RecoverTaskRequest, RecoverTaskResponse, ShutdownRequest, ShutdownResponse,
        SignalTaskRequest, SignalTaskResponse, StartTaskRequest, StartTaskResponse,
        StopTaskRequest, StopTaskResponse, TaskConfig, TaskConfigSchemaRequest,
        TaskConfigSchemaResponse, TaskDriverStatus, TaskEventsRequest, TaskHandle, TaskState,
        TaskStatsRequest, TaskStatsResponse, TaskStatus, WaitTaskRequest, WaitTaskResponse,
        driver_capabilities::FsIsolation, driver_server::Driver, fingerprint_response::HealthState,
        network_isolation_spec::NetworkIsolationMode,
    },
    structs::{Attribute, attribute},
};
use prost_types::Timestamp;
use tokio::sync::watch;
use tokio_stream::wrappers::{BroadcastStream, WatchStream};
use tonic::{Request, Response, Status, Streaming};

pub use error::Error;

use crate::{
    config,
    events::Events,
    fingerprint::Health,
    limits::Limits,
    node::Node,
    slot::{Ended, Identity, Slot},
};

/// Version of the bytes that Nomad keeps for a task; 0 is Nomad's own.
const HANDLE_VERSION: i32 = 1;

/// What Nomad keeps of a task besides its configuration, whose driver part it forgets.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct DriverState {
    slot: config::Slot,
}

/// The driver as Nomad's agent sees it.
#[derive(Debug, Clone)]
pub struct Service {
    /// There once this process is in charge of the node.
    pub node: watch::Receiver<Option<Arc<Node>>>,
    pub health: watch::Receiver<Health>,
    pub events: Events,
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    fn node(&self) -> Result<Arc<Node>, Error> {
        if let Some(node) = self.node.borrow().clone() {
            return Ok(node);
        }
        let reason = match &*self.health.borrow() {
            Health::Unhealthy { reason } => reason.clone(),
            Health::Unconfigured | Health::Healthy { .. } => "it has just been started".into(),
        };
        Err(Error::NotReady { reason })
    }

    fn slot(&self, task_id: &str) -> Result<Arc<Slot>, Error> {
        let node = self.node.borrow().clone();
        let slot = node.and_then(|node| node.slots.by_task(task_id));
        slot.ok_or_else(|| Error::UnknownTask {
            task_id: task_id.to_owned(),
        })
    }

    /// Makes a slot and waits until it is idle.
    async fn start(&self, task: &TaskConfig, config: config::Slot) -> Result<(), Error> {
        let node = self.node()?;
        let identity = identity(task);
        node.slots.check(&identity)?;
        if node.slots.by_task(&identity.task_id).is_some() {
            return Ok(()); // A repeated call, after the agent lost sight of the first.
        }
        let idle = idle_limits(task)?;
        let task_id = identity.task_id.clone();
        let (slot, ready) = Slot::start(&node, identity, config, idle);
        node.slots.add(slot);
        match ready.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                node.slots.remove(&task_id);
                Err(Error::Start(error))
            }
            // The keeper drops it when the task is stopped before it was ever warm.
            Err(_) => {
                node.slots.remove(&task_id);
                Err(Error::StoppedWhileStarting)
            }
        }
    }
}

#[tonic::async_trait]
impl Driver for Service {
    type FingerprintStream = Responses<FingerprintResponse>;
    type TaskStatsStream = Responses<TaskStatsResponse>;
    type TaskEventsStream = Responses<DriverTaskEvent>;
    type ExecTaskStreamingStream = Responses<ExecTaskStreamingResponse>;

    async fn init(&self, _: Request<InitRequest>) -> Result<Response<InitResponse>, Status> {
        Ok(Response::new(InitResponse {}))
    }

    /// The agent stops; tasks go on.
    async fn shutdown(
        &self,
        _: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, Status> {
        Ok(Response::new(ShutdownResponse {}))
    }

    async fn task_config_schema(
        &self,
        _: Request<TaskConfigSchemaRequest>,
    ) -> Result<Response<TaskConfigSchemaResponse>, Status> {
        Ok(Response::new(TaskConfigSchemaResponse {
            spec: Some(config::schema::task()),
        }))
    }

    async fn capabilities(
        &self,
        _: Request<CapabilitiesRequest>,
    ) -> Result<Response<CapabilitiesResponse>, Status> {
        let capabilities = DriverCapabilities {
            fs_isolation: FsIsolation::Image.into(),
            network_isolation_modes: vec![NetworkIsolationMode::Host.into()],
            ..Default::default()
        };
        Ok(Response::new(CapabilitiesResponse {
            capabilities: Some(capabilities),
        }))
    }

    async fn fingerprint(
        &self,
        _: Request<FingerprintRequest>,
    ) -> Result<Response<Self::FingerprintStream>, Status> {
        let health = WatchStream::new(self.health.clone()).map(|health| Ok(encode_health(health)));
        Ok(Response::new(Box::pin(health)))
    }

    /// A slot whose driver died starts afresh: what ran in it is ended, and the
    /// next container takes its place under the same allocation.
    async fn recover_task(
        &self,
        request: Request<RecoverTaskRequest>,
    ) -> Result<Response<RecoverTaskResponse>, Status> {
        let handle = request
            .into_inner()
            .handle
            .ok_or(Error::Missing { field: "handle" })?;
        let task = handle.config.ok_or(Error::Missing {
            field: "handle.config",
        })?;
        let state: DriverState =
            serde_json::from_slice(&handle.driver_state).map_err(Error::Handle)?;
        // Nomad asks right after it has started the plugin.
        let mut node = self.node.clone();
        let taken = node.wait_for(Option::is_some);
        if tokio::time::timeout(TAKE, taken).await.is_err() {
            self.node()?;
        }
        self.start(&task, state.slot).await?;
        Ok(Response::new(RecoverTaskResponse {}))
    }

    async fn start_task(
        &self,
        request: Request<StartTaskRequest>,
    ) -> Result<Response<StartTaskResponse>, Status> {
        let task = request
            .into_inner()
            .task
            .ok_or(Error::Missing { field: "task" })?;
        let slot = config::Slot::parse(&task.msgpack_driver_config).map_err(Error::Config)?;
        self.start(&task, slot.clone()).await?;
        let driver_state = serde_json::to_vec(&DriverState { slot }).map_err(Error::Handle)?;
        let handle = TaskHandle {
            version: HANDLE_VERSION,
            config: Some(task),
            state: TaskState::Running.into(),
            driver_state,
        };
        Ok(Response::new(StartTaskResponse {
            handle: Some(handle),
            ..Default::default()
        }))
    }

    async fn wait_task(
        &self,
        request: Request<WaitTaskRequest>,
    ) -> Result<Response<WaitTaskResponse>, Status> {
        let slot = self.slot(&request.into_inner().task_id)?;
        let (exit_code, err) = match slot.ended().await {
            Ended::Stopped => (0, String::new()),
            Ended::Failed { reason } => (1, reason),
        };
        let result = Some(ExitResult {
            exit_code,
            ..Default::default()
        });
        Ok(Response::new(WaitTaskResponse { result, err }))
    }

    /// Answers at once: a claimed slot stays Nomad's task until its run has ended.
    async fn stop_task(
        &self,
        request: Request<StopTaskRequest>,
    ) -> Result<Response<StopTaskResponse>, Status> {
        if let Ok(slot) = self.slot(&request.into_inner().task_id) {
            slot.drain();
        }
        Ok(Response::new(StopTaskResponse {}))
    }

    async fn destroy_task(
        &self,
        request: Request<DestroyTaskRequest>,
    ) -> Result<Response<DestroyTaskResponse>, Status> {
        let DestroyTaskRequest { task_id, force } = request.into_inner();
        if let Ok(slot) = self.slot(&task_id) {
            if !force && slot.end().is_none() {
                return Err(Error::StillRunning { task_id }.into());
            }
            slot.kill();
            slot.ended().await;
            self.node()?.slots.remove(&task_id);
        }
        Ok(Response::new(DestroyTaskResponse {}))
    }

    async fn inspect_task(
        &self,
        request: Request<InspectTaskRequest>,
    ) -> Result<Response<InspectTaskResponse>, Status> {
        let slot = self.slot(&request.into_inner().task_id)?;
        let end = slot.end();
        // Go's zero time, for a task that has not ended.
        let never = Timestamp {
            seconds: -62_135_596_800,
            nanos: 0,
        };
        let life = slot.life();
        let task = TaskStatus {
            id: slot.identity.task_id.clone(),
            name: slot.identity.task_name.clone(),
            state: if end.is_none() {
                TaskState::Running
            } else {
                TaskState::Exited
            }
            .into(),
            started_at: Some(slot.started.into()),
            completed_at: Some(end.as_ref().map_or(never, |_| SystemTime::now().into())),
            result: Some(ExitResult {
                exit_code: i32::from(matches!(end, Some(Ended::Failed { .. }))),
                ..Default::default()
            }),
        };
        let attributes = [
            ("provider", slot.config.provider.clone()),
            ("image", slot.config.image.clone()),
            ("state", life.state().name().to_owned()),
            ("generation", life.generation().to_string()),
        ];
        let attributes = attributes
            .map(|(name, value)| (name.to_owned(), value))
            .into();
        Ok(Response::new(InspectTaskResponse {
            task: Some(task),
            driver: Some(TaskDriverStatus { attributes }),
            network_override: None,
        }))
    }

    async fn task_stats(
        &self,
        request: Request<TaskStatsRequest>,
    ) -> Result<Response<Self::TaskStatsStream>, Status> {
        let TaskStatsRequest {
            task_id,
            collection_interval,
        } = request.into_inner();
        let slot = self.slot(&task_id)?;
        Ok(Response::new(Box::pin(stats::samples(
            slot,
            collection_interval,
        ))))
    }

    async fn task_events(
        &self,
        _: Request<TaskEventsRequest>,
    ) -> Result<Response<Self::TaskEventsStream>, Status> {
        // An agent that lags behind misses events; it never sees the stream end.
        let events = BroadcastStream::new(self.events.subscribe());
        let events = events.filter_map(async |event| event.ok().map(Ok));
        Ok(Response::new(Box::pin(events)))
    }

    async fn signal_task(
        &self,
        request: Request<SignalTaskRequest>,
    ) -> Result<Response<SignalTaskResponse>, Status> {
        self.slot(&request.into_inner().task_id)?;
        Err(Error::Private {
            operation: "signals are",
        }
        .into())
    }

    async fn exec_task(
        &self,
        request: Request<ExecTaskRequest>,
    ) -> Result<Response<ExecTaskResponse>, Status> {
        self.slot(&request.into_inner().task_id)?;
        Err(Error::Private {
            operation: "exec is",
        }
        .into())
    }

    async fn exec_task_streaming(
        &self,
        request: Request<Streaming<ExecTaskStreamingRequest>>,
    ) -> Result<Response<Self::ExecTaskStreamingStream>, Status> {
        // A call that ends while its first message is on the way shows no reason.
        let _setup = request.into_inner().message().await?;
        Err(Error::Private {
            operation: "exec is",
        }
        .into())
    }

    async fn create_network(
        &self,
        _: Request<CreateNetworkRequest>,
    ) -> Result<Response<CreateNetworkResponse>, Status> {
        Err(Error::NoNetworks.into())
    }

    async fn destroy_network(
        &self,
        _: Request<DestroyNetworkRequest>,
    ) -> Result<Response<DestroyNetworkResponse>, Status> {
        Err(Error::NoNetworks.into())
    }
}

/// How long a recovery waits for the driver to take charge of the node.
const TAKE: std::time::Duration = std::time::Duration::from_secs(10);

fn identity(task: &TaskConfig) -> Identity {
    Identity {
        task_id: task.id.clone(),
        task_name: task.name.clone(),
        alloc_id: task.alloc_id.clone(),
        job_id: task.job_id.clone(),
        namespace: task.namespace.clone(),
        node_id: task.node_id.clone(),
    }
}

/// An idle slot gets the CPU and memory that its job reserves.
fn idle_limits(task: &TaskConfig) -> Result<Limits, Error> {
    let missing = || Error::Missing { field: "resources" };
    let resources = task
        .resources
        .as_ref()
        .and_then(|r| r.allocated_resources.as_ref());
    let resources = resources.ok_or_else(missing)?;
    let positive = |value: i64| u32::try_from(value).ok().filter(|value| *value > 0);
    let cpu = resources
        .cpu
        .as_ref()
        .and_then(|cpu| positive(cpu.cpu_shares));
    let memory = resources
        .memory
        .as_ref()
        .and_then(|memory| positive(memory.memory_mb));
    Ok(Limits {
        cpu_mhz: cpu.ok_or_else(missing)?,
        memory_mb: memory.ok_or_else(missing)?,
        ..Limits::IDLE
    })
}

fn encode_health(health: Health) -> FingerprintResponse {
    let text = |value| Attribute {
        value: Some(attribute::Value::StringVal(value)),
        unit: String::new(),
    };
    match health {
        Health::Unconfigured => FingerprintResponse {
            health: HealthState::Undetected.into(),
            health_description: "not configured yet".into(),
            ..Default::default()
        },
        Health::Unhealthy { reason } => FingerprintResponse {
            health: HealthState::Unhealthy.into(),
            health_description: reason,
            ..Default::default()
        },
        Health::Healthy { attributes } => FingerprintResponse {
            attributes: attributes
                .into_iter()
                .map(|(name, value)| (name, text(value)))
                .collect(),
            health: HealthState::Healthy.into(),
            health_description: "Healthy".into(),
            ..Default::default()
        },
    }
}
