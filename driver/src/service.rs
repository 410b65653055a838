//! The RPCs of a Nomad task driver: decode, ask the books and the slots, encode.

mod error;
mod exec;
mod start;
mod state;
mod stats;
mod work;

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt};
use polydev_proto::{
    driver::{
        CapabilitiesRequest, CapabilitiesResponse, CreateNetworkRequest, CreateNetworkResponse,
        DestroyNetworkRequest, DestroyNetworkResponse, DestroyTaskRequest, DestroyTaskResponse,
        DriverCapabilities, DriverTaskEvent, ExecTaskRequest, ExecTaskResponse,
        ExecTaskStreamingRequest, ExecTaskStreamingResponse, ExitResult, FingerprintRequest,
        FingerprintResponse, InitRequest, InitResponse, InspectTaskRequest, InspectTaskResponse,
        NetworkIsolationSpec, RecoverTaskRequest, RecoverTaskResponse, ShutdownRequest,
        ShutdownResponse, SignalTaskRequest, SignalTaskResponse, StartTaskRequest,
        StartTaskResponse, StopTaskRequest, StopTaskResponse, TaskConfig, TaskConfigSchemaRequest,
        TaskConfigSchemaResponse, TaskEventsRequest, TaskHandle, TaskState, TaskStatsRequest,
        TaskStatsResponse, WaitTaskRequest, WaitTaskResponse, driver_capabilities::FsIsolation,
        driver_server::Driver, fingerprint_response::HealthState,
        network_isolation_spec::NetworkIsolationMode,
    },
    structs::{Attribute, attribute},
};
use tokio::sync::watch;
use tokio_stream::wrappers::{BroadcastStream, WatchStream};
use tonic::{Request, Response, Status, Streaming};

pub use error::Error;
pub use state::DriverState;
use work::Work;

use crate::{
    config::{self, Config},
    events::Events,
    fingerprint::Health,
    node::Node,
    task::{self, Task},
};

/// The driver, as a Nomad agent sees it.
#[derive(Debug, Clone)]
pub struct Service {
    /// Present once this process is in charge of the node.
    pub node: watch::Receiver<Option<Arc<Node>>>,
    pub health: watch::Receiver<Health>,
    pub events: Events,
    /// Each stream to an agent holds a reference, as long as the agent is connected.
    pub attached: Arc<()>,
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    fn node(&self) -> Result<Arc<Node>, Error> {
        if let Some(node) = self.node.borrow().clone() {
            return Ok(node);
        }
        let reason = match &*self.health.borrow() {
            Health::Unhealthy { reason } => reason.clone(),
            Health::Unconfigured | Health::Healthy { .. } => "it has just started".into(),
        };
        Err(Error::NotReady { reason })
    }

    /// Waits for the node: Nomad sends requests right after it starts the plugin.
    async fn taken(&self) -> Result<Arc<Node>, Error> {
        let mut taken = self.node.clone();
        let _overrun = tokio::time::timeout(TAKE_TIMEOUT, taken.wait_for(Option::is_some)).await;
        self.node()
    }

    /// Waits for the node, and for Docker's first response.
    async fn ready(&self) -> Result<Arc<Node>, Error> {
        let node = self.taken().await?;
        let mut ready = node.site.ready.subscribe();
        match tokio::time::timeout(TAKE_TIMEOUT, ready.wait_for(|ready| *ready)).await {
            Ok(Ok(_)) => {}
            _ => {
                let reason = "Docker does not respond".into();
                return Err(Error::NotReady { reason });
            }
        }
        Ok(node)
    }

    fn work(&self, task_id: &str) -> Result<Work, Error> {
        let node = self.node.borrow().clone();
        let work = node.and_then(|node| Work::find(&node, task_id));
        work.ok_or_else(|| Error::UnknownTask {
            task_id: task_id.to_owned(),
        })
    }

    /// Finds a plain task whose container may be entered. A slot's container belongs to its
    /// user alone.
    fn open(&self, task_id: &str, operation: &'static str) -> Result<Arc<Task>, Error> {
        match self.work(task_id)? {
            Work::Slot(_) => Err(Error::Private { operation }),
            Work::Plain(task) if task.end().is_some() => Err(Error::Ended),
            Work::Plain(task) => Ok(task),
        }
    }

    async fn start(&self, task: &TaskConfig, config: Config) -> Result<(), Error> {
        let node = self.ready().await?;
        config
            .check_allowed(&node.site.config)
            .map_err(Error::Config)?;
        match config {
            Config::Slot(config) => {
                let Some((slot, ready)) = start::slot(&node.slots, task, config)? else {
                    return Ok(());
                };
                slot.want();
                let failed = match ready.await {
                    Ok(Ok(())) => return Ok(()),
                    Ok(Err(error)) => Error::Start(error),
                    // The keeper drops the sender when the task is stopped before its slot
                    // was warm.
                    Err(_) => Error::StoppedWhileStarting,
                };
                node.slots.book.remove(&task.id);
                Err(failed)
            }
            Config::Plain(options) => start::plain(&node.tasks, task, *options).await,
        }
    }
}

#[tonic::async_trait]
impl Driver for Service {
    type FingerprintStream = Responses<FingerprintResponse>;
    type TaskStatsStream = Responses<TaskStatsResponse>;
    type TaskEventsStream = Responses<DriverTaskEvent>;
    type ExecTaskStreamingStream = Responses<ExecTaskStreamingResponse>;

    /// Of agents from Nomad 2.0.4 on. What is missing on the node is told by the fingerprint.
    async fn init(&self, _: Request<InitRequest>) -> Result<Response<InitResponse>, Status> {
        Ok(Response::new(InitResponse {}))
    }

    /// Of agents from Nomad 2.0.4 on, when they stop or load the plugin anew. Tasks continue;
    /// go-plugin's own end follows, and the driver leaves with that.
    async fn shutdown(
        &self,
        _: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, Status> {
        tracing::info!("the agent ends this driver");
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
        let node = self.node.borrow().clone();
        let modes = [
            NetworkIsolationMode::Host,
            NetworkIsolationMode::Group,
            NetworkIsolationMode::Task,
        ];
        let capabilities = DriverCapabilities {
            send_signals: true,
            exec: true,
            fs_isolation: FsIsolation::Image.into(),
            network_isolation_modes: modes.map(Into::into).into(),
            must_create_network: true,
            disable_log_collection: node
                .is_some_and(|node| node.site.config.disable_log_collection),
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
        let attached = self.attached.clone();
        let health = WatchStream::new(self.health.clone()).map(move |health| {
            let _held_by_the_stream = &attached;
            Ok(encode_health(health))
        });
        Ok(Response::new(Box::pin(health)))
    }

    /// Plain tasks and runs in slots were already recovered from the journal. An idle
    /// container is recovered when Nomad waits for its slot.
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
        let state = DriverState::decode(&handle.driver_state).map_err(Error::Handle)?;
        let node = self.taken().await?;
        match state.slot {
            Some(slot) => drop(start::slot(&node.slots, &task, slot)?),
            None if node.tasks.book.get(&task.id).is_some() => {
                tracing::info!(task = task.id, "Nomad asked for a recovered task");
            }
            None => return Err(Error::UnknownTask { task_id: task.id }.into()),
        }
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
        let config = Config::parse(&task.msgpack_driver_config).map_err(Error::Config)?;
        let slot = match &config {
            Config::Slot(slot) => Some(slot.clone()),
            Config::Plain(_) => None,
        };
        self.start(&task, config).await?;
        let network_override = self.work(&task.id).ok().and_then(|work| work.network());
        let driver_state = DriverState { slot }.encode();
        let handle = TaskHandle {
            version: state::VERSION,
            config: Some(task),
            state: TaskState::Running.into(),
            driver_state,
        };
        Ok(Response::new(StartTaskResponse {
            handle: Some(handle),
            network_override,
            ..Default::default()
        }))
    }

    async fn wait_task(
        &self,
        request: Request<WaitTaskRequest>,
    ) -> Result<Response<WaitTaskResponse>, Status> {
        let task_id = request.into_inner().task_id;
        let work = self.work(&task_id)?;
        tracing::info!(task = task_id, "Nomad waits for the task's end");
        Ok(Response::new(work.wait().await))
    }

    /// An unknown task counts as stopped: the response cannot say that it is unknown.
    async fn stop_task(
        &self,
        request: Request<StopTaskRequest>,
    ) -> Result<Response<StopTaskResponse>, Status> {
        let StopTaskRequest {
            task_id,
            timeout,
            signal,
        } = request.into_inner();
        let node = self.taken().await?;
        if let Some(work) = Work::find(&node, &task_id) {
            let limit = timeout.and_then(|limit| Duration::try_from(limit).ok());
            work.stop(&node, &signal, limit.unwrap_or_default()).await;
        }
        Ok(Response::new(StopTaskResponse {}))
    }

    async fn destroy_task(
        &self,
        request: Request<DestroyTaskRequest>,
    ) -> Result<Response<DestroyTaskResponse>, Status> {
        let DestroyTaskRequest { task_id, force } = request.into_inner();
        let node = self.taken().await?;
        if let Some(work) = Work::find(&node, &task_id) {
            if !force && !work.has_ended() {
                return Err(Error::StillRunning { task_id }.into());
            }
            work.destroy(&node).await;
        }
        Ok(Response::new(DestroyTaskResponse {}))
    }

    async fn inspect_task(
        &self,
        request: Request<InspectTaskRequest>,
    ) -> Result<Response<InspectTaskResponse>, Status> {
        let work = self.work(&request.into_inner().task_id)?;
        Ok(Response::new(work.inspect()))
    }

    async fn task_stats(
        &self,
        request: Request<TaskStatsRequest>,
    ) -> Result<Response<Self::TaskStatsStream>, Status> {
        let TaskStatsRequest {
            task_id,
            collection_interval,
        } = request.into_inner();
        let work = self.work(&task_id)?;
        let mhz = self.node()?.site.compute.mhz_of_a_core();
        let samples = stats::samples(work, mhz, collection_interval);
        Ok(Response::new(Box::pin(samples)))
    }

    async fn task_events(
        &self,
        _: Request<TaskEventsRequest>,
    ) -> Result<Response<Self::TaskEventsStream>, Status> {
        // An agent that lags misses events, but its stream does not end.
        let events = BroadcastStream::new(self.events.subscribe());
        let events = events.filter_map(async |event| event.ok().map(Ok));
        Ok(Response::new(Box::pin(events)))
    }

    async fn signal_task(
        &self,
        request: Request<SignalTaskRequest>,
    ) -> Result<Response<SignalTaskResponse>, Status> {
        let SignalTaskRequest { task_id, signal } = request.into_inner();
        let task = self.open(&task_id, "signals are")?;
        task.signal(&signal).map_err(Error::Signal)?;
        Ok(Response::new(SignalTaskResponse {}))
    }

    async fn exec_task(
        &self,
        request: Request<ExecTaskRequest>,
    ) -> Result<Response<ExecTaskResponse>, Status> {
        let ExecTaskRequest {
            task_id,
            command,
            timeout,
        } = request.into_inner();
        let task = self.open(&task_id, "exec is")?;
        let limit = timeout.and_then(|limit| Duration::try_from(limit).ok());
        let limit = limit
            .filter(|limit| !limit.is_zero())
            .unwrap_or(CHECK_TIMEOUT);
        let site = self.node()?.site.clone();
        let outcome = task::exec::run(&site.docker, &task.entry.container, command, limit)
            .await
            .map_err(Error::Exec)?;
        Ok(Response::new(ExecTaskResponse {
            stdout: outcome.output,
            stderr: Vec::new(),
            result: Some(ExitResult {
                exit_code: outcome.exit_code,
                ..Default::default()
            }),
        }))
    }

    async fn exec_task_streaming(
        &self,
        request: Request<Streaming<ExecTaskStreamingRequest>>,
    ) -> Result<Response<Self::ExecTaskStreamingStream>, Status> {
        let mut requests = request.into_inner();
        // If the call ends before its first message arrives, the reason is unknown.
        let setup = requests.message().await?.and_then(|first| first.setup);
        let setup = setup.ok_or(Error::Missing { field: "setup" })?;
        let task = self.open(&setup.task_id, "exec is")?;
        let site = self.node()?.site.clone();
        let container = &task.entry.container;
        let exec = site.docker.exec(container, setup.command, setup.tty);
        let exec = exec.await.map_err(Error::Exec)?;
        Ok(Response::new(Box::pin(exec::serve(
            &site.background,
            container.clone(),
            exec,
            requests,
        ))))
    }

    async fn create_network(
        &self,
        request: Request<CreateNetworkRequest>,
    ) -> Result<Response<CreateNetworkResponse>, Status> {
        let CreateNetworkRequest { alloc_id, hostname } = request.into_inner();
        let node = self.ready().await?;
        let network = node.networks.create(&node.site, &alloc_id, &hostname).await;
        let network = network.map_err(Error::Network)?;
        Ok(Response::new(CreateNetworkResponse {
            isolation_spec: Some(NetworkIsolationSpec {
                mode: NetworkIsolationMode::Group.into(),
                path: network.namespace,
                labels: network.labels.into_iter().collect(),
                hosts_config: None,
            }),
            created: network.created,
        }))
    }

    async fn destroy_network(
        &self,
        request: Request<DestroyNetworkRequest>,
    ) -> Result<Response<DestroyNetworkResponse>, Status> {
        let DestroyNetworkRequest {
            alloc_id,
            isolation_spec,
        } = request.into_inner();
        let labels = isolation_spec.map(|spec| spec.labels.into_iter().collect());
        let (node, labels) = (self.node()?, labels.unwrap_or_default());
        let destroyed = node.networks.destroy(&node.site, &alloc_id, &labels).await;
        destroyed.map_err(Error::Network)?;
        Ok(Response::new(DestroyNetworkResponse {}))
    }
}

/// Used if a script check has no timeout.
const CHECK_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a call waits for the driver to take charge of the node, and how long it waits
/// after that for Docker's first response, if it needs Docker.
const TAKE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

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
