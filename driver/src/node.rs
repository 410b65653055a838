//! What the driver holds once it is in charge of its node: Docker, the node's
//! bridge, its state folder, its slots. There is one at most.

pub mod files;
pub mod lock;
pub mod records;
pub mod service;

use std::{collections::HashMap, io, net::SocketAddr, path::PathBuf, sync::Arc};

use polydev_proto::tls::{self, Callers, Reloading};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::task::TaskTracker;

use crate::{
    config,
    docker::{self, Docker},
    events::Events,
    firewall::{self, Firewall},
    identity::LABEL_INSTANCE,
    images::Images,
    metrics::Metrics,
    run::{self, book::Runs, recover::Open},
    sandbox::Networks,
    slot::{adopt::Shelf, book::Book, breaker::Breakers, headroom::Headroom},
    task::{self, journal::Journal},
};
use lock::Lock;

/// Why the driver cannot take charge yet. All of it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Docker(#[from] docker::Error),
    #[error(transparent)]
    Files(#[from] files::Error),
    #[error(transparent)]
    Firewall(#[from] firewall::Error),
    #[error(transparent)]
    Runs(#[from] run::book::Error),
    #[error("cannot listen at `{path}`")]
    Listen { path: PathBuf, source: io::Error },
    #[error("cannot listen at `shims.listen`, {address}")]
    Shims {
        address: SocketAddr,
        source: io::Error,
    },
}

/// The node, in the hands of this process.
#[derive(Debug)]
pub struct Node {
    pub config: config::Plugin,
    pub docker: Docker,
    /// Random, made once for a state folder: what is ours in Docker carries it.
    pub instance: String,
    /// Random, made at each start: a claim names the start it saw.
    pub start_id: String,
    /// Of the Docker network, and the beginning of every container's name.
    pub name: String,
    /// The init program, named by its content.
    pub init: PathBuf,
    /// Holds a folder with a socket for each container.
    pub link_dir: PathBuf,
    pub resolv_conf: PathBuf,
    firewall: Firewall,
    pub compute: Compute,
    pub images: Arc<Images>,
    pub slots: Book,
    /// Idle containers, as the next life of the driver will find them.
    pub idle: Shelf,
    pub runs: Arc<Runs>,
    pub headroom: Arc<Headroom>,
    pub breakers: Breakers,
    /// Containers of slots that may be made at the same time: more would slow the runs.
    pub fills: Semaphore,
    pub plain: task::book::Book,
    pub journal: Journal,
    pub networks: Networks,
    pub events: Events,
    pub metrics: Metrics,
    pub tasks: TaskTracker,
    /// Docker has answered once.
    pub ready: watch::Sender<bool>,
    _lock: Lock,
}

/// The node's CPUs, as Nomad counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compute {
    /// All cores together.
    pub mhz: i64,
    pub cores: i64,
}

impl Compute {
    /// As Nomad turns a percentage of a core into ticks.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "MHz are far below 2^52")]
    pub fn mhz_of_a_core(&self) -> f64 {
        self.mhz as f64 / self.cores.max(1) as f64
    }
}

impl Node {
    /// Takes up what an earlier life of the driver left and starts to serve shims.
    /// Docker is not asked for anything: [`Node::prepare`] does that.
    ///
    /// # Errors
    /// [`Error`] with the lock, to try again with.
    pub fn take(
        config: config::Plugin,
        compute: Compute,
        lock: Lock,
        events: Events,
    ) -> Result<Arc<Self>, (Error, Lock)> {
        let prepared = match Prepared::make(&config) {
            Ok(prepared) => prepared,
            Err(error) => return Err((error, lock)),
        };
        let Prepared {
            docker,
            instance,
            init,
            link_dir,
            resolv_conf,
            journal,
            idle,
            runs,
            open,
            listener,
            secured,
            metrics,
        } = prepared;
        let text = std::fs::read_to_string(&resolv_conf).unwrap_or_default();
        let node = Arc::new(Self {
            firewall: Firewall::new(&instance, &interface(&instance), &text),
            images: Images::new(&config, docker.clone()),
            networks: Networks::open(&config.state_dir),
            headroom: Headroom::new(config.run_headroom),
            breakers: Breakers::default(),
            fills: Semaphore::new(2 * usize::try_from(compute.cores).unwrap_or(0).max(1)),
            config,
            docker,
            start_id: uuid::Uuid::new_v4().to_string(),
            name: format!("polydev-{instance}"),
            instance,
            init,
            link_dir,
            resolv_conf,
            compute,
            slots: Book::new(),
            idle,
            runs: runs.into(),
            plain: task::book::Book::default(),
            journal,
            events,
            metrics,
            tasks: TaskTracker::new(),
            ready: watch::Sender::new(false),
            _lock: lock,
        });
        node.metrics.watch(&node);
        task::recover(&node);
        run::recover::recover(&node, open);
        node.images.collect();
        let local = UnixListenerStream::new(listener);
        node.tasks.spawn(service::serve(node.clone(), local));
        if let (Some((listener, files)), Some(shims)) = (secured, &node.config.shims) {
            let known = service::known(tls::incoming(listener, files), shims.allow.clone());
            node.tasks.spawn(service::serve(node.clone(), known));
        }
        node.tasks.spawn(run::book::keep(node.runs.clone()));
        node.tasks.spawn(crate::reap::run(node.clone()));
        Ok(node)
    }

    /// Agrees with Docker on a version and makes the slots' bridge and its rules.
    ///
    /// # Errors
    /// [`Error`]; to be tried again.
    pub async fn prepare(&self) -> Result<(), Error> {
        self.docker.negotiate().await?;
        let labels = HashMap::from([(LABEL_INSTANCE.to_owned(), self.instance.clone())]);
        self.docker
            .ensure_bridge(&self.name, &interface(&self.instance), &labels)
            .await?;
        Ok(self.firewall.ensure().await?)
    }

    /// Where shims reach the node service.
    #[must_use]
    pub fn address(&self) -> String {
        if let Some(shims) = &self.config.shims {
            return shims.advertise.clone();
        }
        format!("unix://{}", socket_path(&self.config).display())
    }

    /// Takes away what only a driver with slots needs. Bounded by the engine's deadlines.
    pub async fn leave(&self) {
        let _gone = std::fs::remove_file(socket_path(&self.config));
        if self.runs.going() > 0 || self.slots.all().iter().any(|slot| slot.end().is_none()) {
            return;
        }
        self.runs.leave();
        match self.docker.remove_bridge(&self.name).await {
            Ok(()) => self.firewall.remove().await,
            Err(error) => {
                tracing::info!(error = &error as &dyn std::error::Error, "the bridge stays");
            }
        }
    }
}

/// The bridge's name for the kernel, which takes 15 letters.
fn interface(instance: &str) -> String {
    format!("pd-{instance}")
}

fn secured(shims: &config::Shims) -> io::Result<(TcpListener, Arc<Reloading>)> {
    let files = Reloading::new(shims.files.clone(), &[tls::GRPC], Callers::Certified)?;
    let listener = std::net::TcpListener::bind(shims.listen)?;
    listener.set_nonblocking(true)?;
    Ok((TcpListener::from_std(listener)?, Arc::new(files)))
}

fn socket_path(config: &config::Plugin) -> PathBuf {
    config.state_dir.join("node.sock")
}

struct Prepared {
    docker: Docker,
    instance: String,
    init: PathBuf,
    link_dir: PathBuf,
    resolv_conf: PathBuf,
    journal: Journal,
    idle: Shelf,
    runs: Runs,
    /// Runs that go on.
    open: Vec<Open>,
    listener: tokio::net::UnixListener,
    /// For shims on other machines.
    secured: Option<(TcpListener, Arc<Reloading>)>,
    metrics: Metrics,
}

impl Prepared {
    fn make(config: &config::Plugin) -> Result<Self, Error> {
        let docker = Docker::new(&config.endpoint);
        let instance = files::instance(&config.state_dir)?;
        let init = files::install_init(&config.init_path, &config.state_dir)?;
        let resolv_conf = files::write_resolv_conf(&config.state_dir)?;
        let journal = Journal::open(&config.state_dir)?;
        let (runs, open) = Runs::open(&config.state_dir)?;
        let tasks = journal.read().into_iter().filter_map(|entry| entry.link);
        let links = open.iter().map(|open| open.link().to_owned());
        let idle = Shelf::open(&config.state_dir)?;
        let in_use: Vec<PathBuf> = tasks.chain(links).chain(idle.links()).collect();
        let link_dir = files::folder_of(&config.state_dir.join("link"), &in_use)?;

        let path = socket_path(config);
        let listener = service::listen(&path).map_err(|source| Error::Listen { path, source })?;
        let secured = config.shims.as_ref().map(|shims| {
            secured(shims).map_err(|source| Error::Shims {
                address: shims.listen,
                source,
            })
        });
        Ok(Self {
            secured: secured.transpose()?,
            // Last of what may fail: it is not to be begun and ended with every try.
            metrics: Metrics::new(config.telemetry.as_ref(), &instance),
            docker,
            instance,
            init,
            link_dir,
            resolv_conf,
            journal,
            idle,
            runs,
            open,
            listener,
        })
    }
}
