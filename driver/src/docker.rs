//! The Docker engine, as far as the driver needs it. With its submodule the only
//! place that names bollard; every call has a deadline.

mod container;

pub use container::ContainerSpec;

use std::{collections::HashMap, time::Duration};

use bollard::{
    API_DEFAULT_VERSION,
    errors::Error as ApiError,
    models::{ContainerUpdateBody, NetworkCreateRequest},
    query_parameters::{
        CreateContainerOptionsBuilder, CreateImageOptionsBuilder, InspectContainerOptions,
        InspectNetworkOptions, ListContainersOptionsBuilder, LogsOptionsBuilder,
        RemoveContainerOptionsBuilder,
    },
};
use futures_util::{StreamExt, TryStreamExt};
use tokio::time::timeout;

use crate::limits::{CPU_PERIOD, Limits};

/// For whatever dockerd does by itself; an overloaded one takes seconds.
const CALL: Duration = Duration::from_secs(60);
/// For a sign of life.
const PING: Duration = Duration::from_secs(2);
/// For a whole image.
const PULL: Duration = Duration::from_secs(15 * 60);

/// Why Docker did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {operation}")]
    Call { operation: String, source: ApiError },
    #[error("cannot {operation}: no answer from dockerd in {} s", after.as_secs())]
    TimedOut { operation: String, after: Duration },
    #[error("endpoint `{endpoint}` is not a unix:// address")]
    Endpoint { endpoint: String },
}

impl Error {
    /// Docker knows no such image, container or network.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.status() == Some(404)
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
    api: bollard::Docker,
}

/// What a slot must know of its image.
#[derive(Debug, Clone)]
pub struct Image {
    /// Numeric or by name, as the image says; empty means root.
    pub user: String,
    /// `HOME` of its environment.
    pub home: Option<String>,
}

/// A container of ours, as a listing shows it.
#[derive(Debug, Clone)]
pub struct Listed {
    pub id: String,
    pub labels: HashMap<String, String>,
}

/// How a container's process 1 is or has ended.
#[derive(Debug, Clone, Copy)]
pub struct State {
    /// 0 when it does not run.
    pub pid: u32,
    pub exit_code: i64,
}

impl Docker {
    /// Connects and agrees on an API version.
    ///
    /// # Errors
    /// [`Error`] while the engine does not answer.
    pub async fn connect(endpoint: &str) -> Result<Self, Error> {
        let Some(path) = endpoint.strip_prefix("unix://") else {
            return Err(Error::Endpoint {
                endpoint: endpoint.to_owned(),
            });
        };
        let operation = || format!("reach Docker at {endpoint}");
        let api = bollard::Docker::connect_with_unix(path, CALL.as_secs(), API_DEFAULT_VERSION)
            .map_err(|source| Error::Call {
                operation: operation(),
                source,
            })?;
        let api = within(PING, operation(), api.negotiate_version()).await?;
        Ok(Self { api })
    }

    /// The engine's version, as a sign of life.
    ///
    /// # Errors
    /// [`Error`] if it does not answer within two seconds.
    pub async fn version(&self) -> Result<String, Error> {
        let version = within(PING, "ask Docker for its version", self.api.version()).await?;
        Ok(version.version.unwrap_or_default())
    }

    /// # Errors
    /// [`Error`]; [`Error::is_not_found`] if the image is not on this node.
    pub async fn image(&self, reference: &str) -> Result<Image, Error> {
        let operation = format!("inspect image `{reference}`");
        let image = within(CALL, operation, self.api.inspect_image(reference)).await?;
        let config = image.config.unwrap_or_default();
        let home = config
            .env
            .into_iter()
            .flatten()
            .find_map(|variable| variable.strip_prefix("HOME=").map(str::to_owned));
        Ok(Image {
            user: config.user.unwrap_or_default(),
            home,
        })
    }

    /// # Errors
    /// [`Error`] if the registry cannot be reached or has no such image.
    pub async fn pull(&self, reference: &str) -> Result<(), Error> {
        // Without a tag the API would pull every tag there is.
        let last = reference.rsplit('/').next().unwrap_or(reference);
        let tag = if last.contains([':', '@']) {
            ""
        } else {
            "latest"
        };
        let options = CreateImageOptionsBuilder::new()
            .from_image(reference)
            .tag(tag)
            .build();
        let progress = self.api.create_image(Some(options), None, None);
        let done = progress.try_for_each(|_| std::future::ready(Ok(())));
        within(PULL, format!("pull image `{reference}`"), done).await
    }

    /// Makes the node's bridge, unless it is there. Containers on it reach the
    /// outside and not each other.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn ensure_bridge(
        &self,
        name: &str,
        interface: &str,
        labels: &HashMap<String, String>,
    ) -> Result<(), Error> {
        let inspect = self
            .api
            .inspect_network(name, None::<InspectNetworkOptions>);
        match within(CALL, format!("inspect network `{name}`"), inspect).await {
            Ok(_) => return Ok(()),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        let option = |key: &str, value: &str| (format!("com.docker.network.{key}"), value.into());
        let request = NetworkCreateRequest {
            name: name.into(),
            driver: Some("bridge".into()),
            options: Some(HashMap::from([
                option("bridge.name", interface),
                option("bridge.enable_icc", "false"),
            ])),
            labels: Some(labels.clone()),
            ..Default::default()
        };
        let create = self.api.create_network(request);
        within(CALL, format!("create network `{name}`"), create)
            .await
            .map(drop)
    }

    /// Removes a bridge that no container is on; one that is gone is no error.
    ///
    /// # Errors
    /// [`Error`] if it is in use.
    pub async fn remove_bridge(&self, name: &str) -> Result<(), Error> {
        let remove = self.api.remove_network(name);
        ignore_missing(within(CALL, format!("remove network `{name}`"), remove).await)
    }

    /// Creates a container and returns its id.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn create(&self, spec: &ContainerSpec) -> Result<String, Error> {
        let options = CreateContainerOptionsBuilder::new()
            .name(&spec.name)
            .build();
        let create = self.api.create_container(Some(options), spec.body());
        let created = within(CALL, format!("create container `{}`", spec.name), create).await?;
        Ok(created.id)
    }

    /// # Errors
    /// [`Error`]
    pub async fn start(&self, id: &str) -> Result<(), Error> {
        let start = self.api.start_container(id, None);
        within(CALL, format!("start container `{id}`"), start).await
    }

    /// # Errors
    /// [`Error`]
    pub async fn state(&self, id: &str) -> Result<State, Error> {
        let inspect = self
            .api
            .inspect_container(id, None::<InspectContainerOptions>);
        let container = within(CALL, format!("inspect container `{id}`"), inspect).await?;
        let state = container.state.unwrap_or_default();
        Ok(State {
            pid: state
                .pid
                .and_then(|pid| u32::try_from(pid).ok())
                .unwrap_or(0),
            exit_code: state.exit_code.unwrap_or(0),
        })
    }

    /// The last lines a container's process 1 printed, for an error message.
    pub async fn last_words(&self, id: &str) -> String {
        let options = LogsOptionsBuilder::new()
            .stdout(true)
            .stderr(true)
            .tail("5")
            .build();
        let lines = self
            .api
            .logs(id, Some(options))
            .take(16)
            .map_ok(|line| line.to_string());
        let lines = within(PING, "read logs", lines.try_collect::<String>()).await;
        lines.unwrap_or_default().trim().to_owned()
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
        let update = self.api.update_container(id, body);
        within(CALL, format!("update container `{id}`"), update).await
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
        let remove = self.api.remove_container(id, Some(options));
        let removed = within(CALL, format!("remove container `{id}`"), remove).await;
        match removed {
            // Somebody else is at it: the outcome is the same.
            Err(error) if error.status() == Some(409) => Ok(()),
            removed => ignore_missing(removed),
        }
    }

    /// All containers, running or not, with the label `key=value`.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn list(&self, key: &str, value: &str) -> Result<Vec<Listed>, Error> {
        let filters = HashMap::from([("label", vec![format!("{key}={value}")])]);
        let filters: HashMap<String, Vec<String>> = filters
            .into_iter()
            .map(|(key, values)| (key.to_owned(), values))
            .collect();
        let options = ListContainersOptionsBuilder::new()
            .all(true)
            .filters(&filters)
            .build();
        let list = self.api.list_containers(Some(options));
        let listed = within(CALL, "list containers", list).await?;
        Ok(listed
            .into_iter()
            .map(|container| Listed {
                id: container.id.unwrap_or_default(),
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
