//! The parts of the Docker engine that the driver uses. Only this module and its submodules
//! use bollard; every call has a deadline.

mod container;
mod ended;
mod exec;
mod image;
mod logs;
pub(crate) mod name;
mod network;
mod plain;
pub(crate) mod removal;
mod sandbox;

pub use container::ContainerSpec;
pub use ended::Ended;
pub use exec::{Exec, Input as ExecInput, Output as ExecOutput, Piece};
pub use image::{Credentials, Image, Progress, Stored, TOKEN_USER, is_latest};
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
        ContainerUpdateBody, SystemVersion,
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

/// For anything that dockerd does by itself; an overloaded dockerd takes seconds.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// For a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a Docker request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {operation}")]
    Call { operation: String, source: ApiError },
    #[error("cannot {operation}: no response from dockerd within {} s", after.as_secs())]
    TimedOut { operation: String, after: Duration },
    #[error("cannot {operation}: no progress for {} s", after.as_secs())]
    Stalled { operation: String, after: Duration },
    #[error(
        "network `{name}` has `{option}` = `{found}`; must be `{wanted}`: remove it, and the driver creates it again"
    )]
    OtherNetwork {
        name: String,
        option: String,
        found: String,
        wanted: String,
    },
    #[error(
        "the engine at {address} is {engine}; must be Docker Engine: docs/engines.md says what Podman lacks"
    )]
    Podman { address: String, engine: String },
    #[error("`mac_address` is `{given}`: must be absent with a Docker older than 25 (API 1.44)")]
    MacAddress { given: String },
}

impl Error {
    /// Whether Docker does not know the image, container or network.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.status() == Some(404)
    }

    /// Whether the registry does not have the image, or not for this machine. Another
    /// attempt in a minute would also fail. Docker reports this only as text, in the middle
    /// of a pull.
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

    /// Whether Docker rejected the request as invalid. Another attempt would also fail.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        let status = self.status();
        matches!(self, Self::MacAddress { .. })
            || status.is_some_and(|status| (400..500).contains(&status) && status != 409)
    }

    /// Whether the error is a response of dockerd.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        self.status().is_some()
    }

    /// Whether the name is already in use, or Docker is already doing this.
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
    /// Created at first use: bollard requires that the socket exists.
    api: OnceLock<bollard::Docker>,
}

/// Facts about an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    pub version: String,
    pub os_type: String,
    pub runtimes: Vec<String>,
}

/// A container of this driver, as in a listing.
#[derive(Debug, Clone)]
pub struct Listed {
    pub id: String,
    pub names: Vec<String>,
    pub runs: bool,
    pub labels: HashMap<String, String>,
}

/// The state of a container's process 1, running or ended.
#[derive(Debug, Clone, Copy)]
pub struct State {
    /// 0 if the process does not run.
    pub pid: u32,
    pub exit_code: i64,
    pub oom_killed: bool,
}

impl Docker {
    /// Does not contact the engine; call [`Docker::negotiate`] first.
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

    /// Agrees on an API version with the engine, for all clones.
    ///
    /// # Errors
    /// [`Error`] while the engine does not respond; [`Error::Podman`].
    pub async fn negotiate(&self) -> Result<(), Error> {
        let address = &self.inner.endpoint.address;
        // All clones of a connection share the version.
        let negotiated = self.api()?.clone().negotiate_version();
        let operation = format!("reach Docker at {address}");
        let api = within(PING_TIMEOUT, operation, negotiated).await?;
        let version = within(PING_TIMEOUT, "get Docker's version", api.version()).await?;
        podman(&version).map_or(Ok(()), |engine| {
            Err(Error::Podman {
                address: address.clone(),
                engine,
            })
        })
    }

    /// Facts about the engine; also serves as a ping.
    ///
    /// # Errors
    /// [`Error`] if the engine does not respond within two seconds.
    pub async fn about(&self) -> Result<About, Error> {
        let info = within(
            PING_TIMEOUT,
            "get information about Docker",
            self.api()?.info(),
        )
        .await?;
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
    /// [`Error`]; [`Error::is_conflict`] if the name is in use.
    pub async fn create_plain(&self, spec: &PlainSpec<'_>) -> Result<String, Error> {
        let version = self.api()?.client_version();
        // An older Docker takes it in a place that newer ones have given up, and ignores this one.
        let is_old = (version.major_version, version.minor_version) < (1, 44);
        if let Some(given) = spec.options.mac_address.clone().filter(|_| is_old) {
            return Err(Error::MacAddress { given });
        }
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

    /// Informs Docker of limits that the driver has already set.
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

    /// Kills and removes a container; a missing container is not an error.
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
            // Someone else is removing the container: the outcome is the same.
            Err(error) if error.is_conflict() => Ok(()),
            removed => ignore_missing(removed),
        }
    }

    /// All containers with the label `key=value`, running or not.
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

/// Name and version, if it is Podman that answers.
fn podman(version: &SystemVersion) -> Option<String> {
    let mut components = version.components.iter().flatten();
    let engine = components.find(|component| component.name == "Podman Engine")?;
    Some(format!("{} {}", engine.name, engine.version))
}

fn ignore_missing(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        result => result,
    }
}

/// Docker's numbers are signed; our values are far below the limit.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts of `GET /version` that matter, of Podman 5.4.2 and of Docker 20.10.24.
    const PODMAN: &str = r#"{"Platform":{"Name":"linux/amd64/debian-13"},"Components":[
        {"Name":"Podman Engine","Version":"5.4.2","Details":{"APIVersion":"5.4.2"}},
        {"Name":"Conmon","Version":"conmon version 2.1.12, commit: unknown"},
        {"Name":"OCI Runtime (runc)","Version":"runc version 1.1.5+ds1"}],
        "Version":"5.4.2","ApiVersion":"1.41","MinAPIVersion":"1.24"}"#;
    const DOCKER: &str = r#"{"Platform":{"Name":""},"Components":[
        {"Name":"Engine","Version":"20.10.24+dfsg1","Details":{"ApiVersion":"1.41"}},
        {"Name":"containerd","Version":"1.6.20~ds1"},
        {"Name":"runc","Version":"1.1.5+ds1"},{"Name":"docker-init","Version":"0.19.0"}],
        "Version":"20.10.24+dfsg1","ApiVersion":"1.41","MinAPIVersion":"1.12"}"#;

    /// An engine that has one answer to everything.
    fn engine(answer: &'static str) -> (tempfile::TempDir, Docker) {
        use std::io::{Read, Write};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("docker.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            for mut asked in listener.incoming().flatten() {
                let length = answer.len();
                while asked.read(&mut [0; 4096]).is_ok_and(|length| length > 0) {
                    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json";
                    let whole = format!("{head}\r\nContent-Length: {length}\r\n\r\n{answer}");
                    let _gone = asked.write_all(whole.as_bytes());
                }
            }
        });
        let endpoint = Endpoint {
            address: format!("unix://{}", path.display()),
            tls: None,
        };
        (folder, Docker::new(&endpoint))
    }

    #[tokio::test]
    async fn an_engine_that_is_podman_is_refused_by_name() {
        let (_folder, docker) = engine(DOCKER);
        docker.negotiate().await.unwrap();
        let (_folder, podman) = engine(PODMAN);
        let error = podman.negotiate().await.unwrap_err().to_string();
        assert!(
            error.ends_with("is Podman Engine 5.4.2; must be Docker Engine: docs/engines.md says what Podman lacks"),
            "{error}"
        );
    }
}
