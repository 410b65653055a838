//! The Docker engine, as far as the driver needs it. With its submodule the only
//! place that names bollard; every call has a deadline.

mod container;
mod exec;
mod image;
mod logs;
mod network;
mod plain;
pub(crate) mod removal;
mod sandbox;

pub use container::ContainerSpec;
pub use exec::{Exec, Input as ExecInput, Output as ExecOutput, Piece};
pub use image::{Credentials, Image, Progress, TOKEN_USER, is_latest};
pub use plain::{InitMounts, Network, PlainSpec, Published, Resources};
pub use sandbox::SandboxSpec;

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bollard::{
    API_DEFAULT_VERSION,
    errors::Error as ApiError,
    models::{
        ContainerCreateBody, ContainerInspectResponse, ContainerSummaryStateEnum,
        ContainerUpdateBody,
    },
    query_parameters::{
        CreateContainerOptionsBuilder, InspectContainerOptions, ListContainersOptionsBuilder,
        RemoveContainerOptionsBuilder,
    },
};
use tokio::time::timeout;

use crate::{
    config::{Endpoint, Tls},
    limits::{CPU_PERIOD, Limits},
};

/// For whatever dockerd does by itself; an overloaded one takes seconds.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// For a sign of life.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Why Docker did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {operation}")]
    Call { operation: String, source: ApiError },
    #[error("cannot {operation}: no answer from dockerd in {} s", after.as_secs())]
    TimedOut { operation: String, after: Duration },
    #[error("cannot {operation}: no progress for {} s", after.as_secs())]
    Stalled { operation: String, after: Duration },
}

impl Error {
    /// Docker knows no such image, container or network.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.status() == Some(404)
    }

    /// The registry has no such image, or none for this machine: it will not have one
    /// in a minute either. Docker tells in words only, in the middle of a pull.
    #[must_use]
    pub fn is_missing_image(&self) -> bool {
        const WORDS: [&str; 5] = [
            "not found",
            "manifest unknown",
            "no matching manifest",
            "pull access denied",
            "invalid reference format",
        ];
        let Self::Call { source, .. } = self else {
            return false;
        };
        let text = source.to_string();
        self.is_not_found() || WORDS.iter().any(|words| text.contains(words))
    }

    /// Docker found the request itself wrong: it will again.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.status()
            .is_some_and(|status| (400..500).contains(&status) && status != 409)
    }

    /// dockerd is there, and this is what it says.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        self.status().is_some()
    }

    /// Docker has another thing of that name, or is at it already.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        self.status() == Some(409)
    }

    fn status(&self) -> Option<u16> {
        match self {
            Self::Call {
                source: ApiError::DockerResponseServerError { status_code, .. },
                ..
            } => Some(*status_code),
            _ => None,
        }
    }
}

/// A connection to one engine; clones share it.
#[derive(Debug, Clone)]
pub struct Docker {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    endpoint: Endpoint,
    /// Made when it is first needed: bollard wants a socket's file to be there.
    api: OnceLock<bollard::Docker>,
}

/// An engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    pub version: String,
    pub os_type: String,
    pub runtimes: Vec<String>,
}

/// A container of ours, as a listing shows it.
#[derive(Debug, Clone)]
pub struct Listed {
    pub id: String,
    pub names: Vec<String>,
    pub runs: bool,
    pub labels: HashMap<String, String>,
}

/// How a container's process 1 is or has ended.
#[derive(Debug, Clone, Copy)]
pub struct State {
    /// 0 when it does not run.
    pub pid: u32,
    pub exit_code: i64,
    pub oom_killed: bool,
}

impl Docker {
    /// An engine that is asked for nothing yet: [`Docker::negotiate`] comes first.
    #[must_use]
    pub fn new(endpoint: &Endpoint) -> Self {
        Self {
            inner: Arc::new(Inner {
                endpoint: endpoint.clone(),
                api: OnceLock::new(),
            }),
        }
    }

    fn api(&self) -> Result<&bollard::Docker, Error> {
        if let Some(api) = self.inner.api.get() {
            return Ok(api);
        }
        let Endpoint { address, tls } = &self.inner.endpoint;
        let (timeout, version) = (CALL_TIMEOUT.as_secs(), API_DEFAULT_VERSION);
        let api = match (address.strip_prefix("unix://"), tls) {
            (Some(path), _) => bollard::Docker::connect_with_unix(path, timeout, version),
            (None, Some(Tls { cert, key, ca })) => {
                bollard::Docker::connect_with_ssl(address, key, cert, ca, timeout, version)
            }
            (None, None) => bollard::Docker::connect_with_http(address, timeout, version),
        };
        let api = api.map_err(|source| Error::Call {
            operation: format!("use Docker at {address}"),
            source,
        })?;
        Ok(self.inner.api.get_or_init(|| api))
    }

    /// Agrees on an API version, for all clones.
    ///
    /// # Errors
    /// [`Error`] while the engine does not answer.
    pub async fn negotiate(&self) -> Result<(), Error> {
        // The version is shared by the clones of a connection.
        let negotiated = self.api()?.clone().negotiate_version();
        within(
            PING_TIMEOUT,
            format!("reach Docker at {}", self.inner.endpoint.address),
            negotiated,
        )
        .await
        .map(drop)
    }

    /// What the engine is, as a sign of life.
    ///
    /// # Errors
    /// [`Error`] if it does not answer within two seconds.
    pub async fn about(&self) -> Result<About, Error> {
        let info = within(PING_TIMEOUT, "ask Docker what it is", self.api()?.info()).await?;
        let mut runtimes: Vec<String> = info.runtimes.unwrap_or_default().into_keys().collect();
        runtimes.sort();
        Ok(About {
            version: info.server_version.unwrap_or_default(),
            os_type: info.os_type.unwrap_or_default(),
            runtimes,
        })
    }

    /// Creates a container and returns its id.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn create(&self, spec: &ContainerSpec) -> Result<String, Error> {
        self.create_container(&spec.name, spec.body()).await
    }

    /// Creates a plain task's container and returns its id.
    ///
    /// # Errors
    /// [`Error`]; [`Error::is_conflict`] if there is one of that name.
    pub async fn create_plain(&self, spec: &PlainSpec<'_>) -> Result<String, Error> {
        self.create_container(&spec.name, spec.body()).await
    }

    async fn create_container(
        &self,
        name: &str,
        body: ContainerCreateBody,
    ) -> Result<String, Error> {
        let options = CreateContainerOptionsBuilder::new().name(name).build();
        let create = self.api()?.create_container(Some(options), body);
        let created = within(CALL_TIMEOUT, format!("create container `{name}`"), create).await?;
        Ok(created.id)
    }

    /// # Errors
    /// [`Error`]
    pub async fn start(&self, id: &str) -> Result<(), Error> {
        let start = self.api()?.start_container(id, None);
        within(CALL_TIMEOUT, format!("start container `{id}`"), start).await
    }

    /// # Errors
    /// [`Error`]
    pub async fn state(&self, id: &str) -> Result<State, Error> {
        let state = self.inspect(id).await?.state.unwrap_or_default();
        Ok(State {
            pid: state
                .pid
                .and_then(|pid| u32::try_from(pid).ok())
                .unwrap_or(0),
            exit_code: state.exit_code.unwrap_or(0),
            oom_killed: state.oom_killed.unwrap_or_default(),
        })
    }

    /// A container's labels.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn labels(&self, id: &str) -> Result<HashMap<String, String>, Error> {
        let container = self.inspect(id).await?;
        let labels = container.config.and_then(|config| config.labels);
        Ok(labels.unwrap_or_default())
    }

    async fn inspect(&self, id: &str) -> Result<ContainerInspectResponse, Error> {
        let options = None::<InspectContainerOptions>;
        let inspect = self.api()?.inspect_container(id, options);
        within(CALL_TIMEOUT, format!("inspect container `{id}`"), inspect).await
    }

    /// Tells Docker of limits that were set behind its back.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn update(&self, id: &str, limits: &Limits) -> Result<(), Error> {
        let body = ContainerUpdateBody {
            memory: signed(limits.memory_bytes()),
            memory_swap: signed(limits.memory_bytes()),
            cpu_period: signed(CPU_PERIOD.as_micros()),
            cpu_quota: signed(limits.cpu_quota().as_micros()),
            pids_limit: Some(limits.pids.into()),
            ..Default::default()
        };
        let update = self.api()?.update_container(id, body);
        within(CALL_TIMEOUT, format!("update container `{id}`"), update).await
    }

    /// Kills and removes a container; one that is gone is no error.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn remove(&self, id: &str) -> Result<(), Error> {
        let options = RemoveContainerOptionsBuilder::new()
            .force(true)
            .v(true)
            .build();
        let remove = self.api()?.remove_container(id, Some(options));
        let removed = within(CALL_TIMEOUT, format!("remove container `{id}`"), remove).await;
        match removed {
            // Somebody else is at it: the outcome is the same.
            Err(error) if error.is_conflict() => Ok(()),
            removed => ignore_missing(removed),
        }
    }

    /// All containers, running or not, with the label `key=value`.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn list(&self, key: &str, value: &str) -> Result<Vec<Listed>, Error> {
        let filters = HashMap::from([("label".to_owned(), vec![format!("{key}={value}")])]);
        let options = ListContainersOptionsBuilder::new()
            .all(true)
            .filters(&filters)
            .build();
        let list = self.api()?.list_containers(Some(options));
        let listed = within(CALL_TIMEOUT, "list containers", list).await?;
        Ok(listed
            .into_iter()
            .map(|container| Listed {
                id: container.id.unwrap_or_default(),
                names: container.names.unwrap_or_default(),
                runs: container.state == Some(ContainerSummaryStateEnum::RUNNING),
                labels: container.labels.unwrap_or_default(),
            })
            .collect())
    }
}

fn ignore_missing(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        result => result,
    }
}

/// Docker's numbers are signed; ours are far below where that matters.
fn signed(value: impl TryInto<i64>) -> Option<i64> {
    value.try_into().ok()
}

async fn within<T>(
    after: Duration,
    operation: impl Into<String>,
    call: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, Error> {
    match timeout(after, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(Error::Call {
            operation: operation.into(),
            source,
        }),
        Err(_) => Err(Error::TimedOut {
            operation: operation.into(),
            after,
        }),
    }
}
