//! Takes charge of the node: first prepares everything that may fail, then recovers the
//! runs and tasks of an earlier life, and only then accepts requests.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use futures_util::StreamExt;
use polydev_transport::{
    accept::accept,
    incoming::{Reloading, incoming},
    tls::{Callers, GRPC},
};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
};
use tokio_util::task::TaskTracker;

use super::{Node, interface, recover, service, socket_path};
use crate::{
    broker::{self, Broker},
    config,
    docker::{self, Docker},
    events::Events,
    firewall::{Firewall, Guard},
    guard,
    images::Images,
    metrics::Metrics,
    permits::{self, Permits},
    reap::{self, Reaper},
    run::{
        self,
        book::{Open, Runs},
    },
    sandbox::Networks,
    site::{Compute, Site},
    slot::{Slots, shelf::Shelf},
    state::{files, lock::Lock},
    task::{self, Tasks, journal::Journal, stage::Stage},
    telemetry::Telemetry,
};

/// systemd's id of the machine (machine-id(5)).
const MACHINE_ID: &str = "/etc/machine-id";

/// Why the driver cannot take charge yet. The caller tries again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Docker(#[from] docker::Error),
    #[error(transparent)]
    Files(#[from] files::Error),
    #[error(transparent)]
    Runs(#[from] run::book::Error),
    #[error(transparent)]
    Permits(#[from] permits::Error),
    #[error("cannot listen at `{path}`")]
    Listen { path: PathBuf, source: io::Error },
    #[error("cannot listen at {address}, given in `shims.listen`")]
    Shims {
        address: SocketAddr,
        source: io::Error,
    },
}

impl Node {
    /// Recovers what an earlier life of the driver left, and starts to serve shims. Docker
    /// is not needed: [`Node::prepare`] contacts it.
    ///
    /// # Errors
    /// [`Error`], with the lock for the next attempt.
    pub fn take(
        config: config::Plugin,
        compute: Compute,
        lock: Lock,
        events: Events,
    ) -> Result<Arc<Self>, (Error, Lock)> {
        let prepared = match Prepared::make(config, compute, events) {
            Ok(prepared) => prepared,
            Err(error) => return Err((error, lock)),
        };
        Ok(prepared.begin(lock))
    }
}

/// The result of every step that may fail.
struct Prepared {
    site: Arc<Site>,
    journal: Journal,
    stage: Stage,
    idle: Shelf,
    runs: Arc<Runs>,
    /// Runs that continue.
    open: Vec<Open>,
    listener: UnixListener,
    /// For shims on other machines.
    secured: Option<(TcpListener, Arc<Reloading>)>,
    telemetry: Telemetry,
}

impl Prepared {
    fn make(config: config::Plugin, compute: Compute, events: Events) -> Result<Self, Error> {
        let docker = Docker::new(&config.endpoint);
        let instance = files::instance(&config.state_dir)?;
        let identity = files::node_identity(&config.state_dir, Path::new(MACHINE_ID))?;
        let permits = Permits::open(&identity, config.execution_keys.as_deref())?;
        let init = files::install_init(&config.init_path, &config.state_dir)?;
        let resolv_conf = config.state_dir.join("resolv.conf");
        files::write_resolv_conf(&resolv_conf, &files::resolv_conf())?;
        let journal = Journal::open(&config.state_dir)?;
        let (runs, open) = Runs::open(&config.state_dir)?;
        let tasks = journal.read().into_iter().filter_map(|entry| entry.link);
        let links = open.iter().map(|open| open.link().to_owned());
        let idle = Shelf::open(&config.state_dir)?;
        let in_use: Vec<PathBuf> = tasks.chain(links).chain(idle.links()).collect();
        let stage = Stage::open(&config.state_dir)?;
        let link_dir = files::folder_of(&config.state_dir.join("link"), &in_use)?;

        let path = socket_path(&config, &instance);
        let listener = service::listen(&path, config.socket_group)
            .map_err(|source| Error::Listen { path, source })?;
        let secured = config.shims.as_ref().map(|shims| {
            secured(shims).map_err(|source| Error::Shims {
                address: shims.listen,
                source,
            })
        });
        Ok(Self {
            secured: secured.transpose()?,
            // Comes last of the steps that may fail, so that failed attempts do not start
            // and stop the export.
            telemetry: Telemetry::open(config.telemetry.as_ref(), &instance),
            site: Arc::new(Site {
                images: Images::new(&config, docker.clone()),
                config,
                docker,
                events,
                broker: Broker::new(),
                permits,
                start_id: uuid::Uuid::new_v4().to_string(),
                name: format!("polydev-{instance}"),
                instance,
                identity,
                init,
                link_dir,
                resolv_conf,
                compute,
                ready: watch::Sender::new(false),
                guard: watch::Sender::new(Guard::Closed {
                    reason: "they are not set yet".into(),
                }),
                background: TaskTracker::new(),
            }),
            journal,
            stage,
            idle,
            runs: runs.into(),
            open,
            listener,
        })
    }

    /// Creates the node, and starts its background tasks.
    fn begin(self, lock: Lock) -> Arc<Node> {
        let Self {
            site,
            journal,
            stage,
            idle,
            runs,
            open,
            listener,
            secured,
            telemetry,
        } = self;
        let metrics = Metrics::new(telemetry.meters());
        let text = std::fs::read_to_string(&site.resolv_conf).unwrap_or_default();
        let slots = Slots::new(site.clone(), runs.clone(), idle, metrics.steps());
        let node = Arc::new(Node {
            firewall: Firewall::new(
                &site.instance,
                &interface(&site.instance),
                &text,
                &site.config.private_networks,
            ),
            networks: Networks::open(&site.config.state_dir).into(),
            slots: slots.into(),
            tasks: Tasks::new(site.clone(), journal, stage).into(),
            site,
            runs,
            telemetry,
            wanted: Arc::new(true.into()),
            _lock: lock,
        });
        let counted = Arc::downgrade(&node.slots);
        let counts = move || counted.upgrade().map(|slots| slots.counts());
        metrics.watch(counts);
        let used = Arc::downgrade(&node.runs);
        let used = move || used.upgrade().map(|runs| runs.tokens.all());
        metrics.watch_tokens(used);
        let errors = Arc::downgrade(&node.runs);
        let errors = move || errors.upgrade().map(|runs| runs.tokens.errors());
        metrics.watch_api_errors(errors);
        let paused = Arc::downgrade(&node.slots);
        let paused = move || paused.upgrade().map(|slots| slots.breakers.paused());
        metrics.watch_paused(paused);
        let runs = Arc::downgrade(&node.runs);
        let scripts = move || runs.upgrade().map(|runs| runs.scripts.figures());
        metrics.watch_scripts(scripts);
        task::recover(&node.tasks);
        recover::recover(&node.slots, open);
        node.site.images.collect();

        let Site {
            config,
            background,
            broker,
            ..
        } = &*node.site;
        let runs = node.runs.clone();
        background.spawn(broker::keep(
            broker.clone(),
            config.broker_path.clone(),
            config.state_dir.clone(),
            config.broker_uid,
            node.slots.book.changes(),
            move |seen| runs.seen(seen),
        ));
        let local = accept(listener).map(Ok);
        background.spawn(service::serve(node.clone(), local));
        if let (Some((listener, files)), Some(shims)) = (secured, &node.site.config.shims) {
            let incoming = incoming(listener, files);
            let known = service::known(incoming, shims.allow.clone());
            background.spawn(service::serve(node.clone(), known));
        }
        background.spawn(run::book::keep(node.runs.clone()));
        let (guarded, runs) = (Arc::downgrade(&node.slots), node.runs.clone());
        let is_needed = move || {
            // A run may outlive its slot.
            if runs.going() > 0 {
                return true;
            }
            let slots = guarded.upgrade().map(|slots| slots.book.all());
            let mut slots = slots.unwrap_or_default().into_iter();
            slots.any(|slot| slot.has_network() && slot.end().is_none())
        };
        background.spawn(guard::keep(
            node.site.clone(),
            node.firewall.clone(),
            interface(&node.site.instance),
            node.wanted.clone(),
            is_needed,
        ));
        background.spawn(reap::run(Reaper {
            site: node.site.clone(),
            slots: node.slots.clone(),
            tasks: node.tasks.clone(),
            networks: node.networks.clone(),
        }));
        node
    }
}

fn secured(shims: &config::Shims) -> io::Result<(TcpListener, Arc<Reloading>)> {
    let files = Reloading::new(shims.files.clone(), &[GRPC], Callers::Certified)?;
    let listener = std::net::TcpListener::bind(shims.listen)?;
    listener.set_nonblocking(true)?;
    Ok((TcpListener::from_std(listener)?, Arc::new(files)))
}
