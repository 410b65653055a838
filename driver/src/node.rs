//! What the driver holds once it is in charge of its node: Docker, the node's
//! bridge, its state folder, its slots. There is one at most.

pub mod files;
pub mod lock;
pub mod service;

use std::{collections::HashMap, io, path::PathBuf, sync::Arc};

use tokio_util::task::TaskTracker;

use crate::{
    config,
    docker::{self, Docker},
    events::Events,
    slot::{LABEL_INSTANCE, book::Book},
};
use lock::Lock;

/// Why the driver cannot take charge yet. All of it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Docker(#[from] docker::Error),
    #[error(transparent)]
    Files(#[from] files::Error),
    #[error("cannot listen at `{path}`")]
    Listen { path: PathBuf, source: io::Error },
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
    pub slots: Book,
    pub events: Events,
    pub tasks: TaskTracker,
    _lock: Lock,
}

impl Node {
    /// Prepares everything a slot needs and starts to serve shims.
    ///
    /// # Errors
    /// [`Error`] with the lock, to try again with.
    pub async fn take(
        config: config::Plugin,
        lock: Lock,
        events: Events,
    ) -> Result<Arc<Self>, (Error, Lock)> {
        match Prepared::make(&config).await {
            Ok(Prepared {
                docker,
                instance,
                name,
                init,
                link_dir,
                resolv_conf,
                listener,
            }) => {
                let node = Arc::new(Self {
                    config,
                    docker,
                    instance,
                    start_id: uuid::Uuid::new_v4().to_string(),
                    name,
                    init,
                    link_dir,
                    resolv_conf,
                    slots: Book::new(),
                    events,
                    tasks: TaskTracker::new(),
                    _lock: lock,
                });
                node.tasks.spawn(service::serve(node.clone(), listener));
                node.tasks.spawn(crate::reap::run(node.clone()));
                Ok(node)
            }
            Err(error) => Err((error, lock)),
        }
    }

    /// Where shims reach the node service.
    #[must_use]
    pub fn address(&self) -> String {
        format!("unix://{}", socket_path(&self.config).display())
    }

    /// Takes away what only a driver with slots needs. Bounded by the engine's deadlines.
    pub async fn leave(&self) {
        let _gone = std::fs::remove_file(socket_path(&self.config));
        if self.slots.all().iter().all(|slot| slot.end().is_some())
            && let Err(error) = self.docker.remove_bridge(&self.name).await
        {
            tracing::info!(error = &error as &dyn std::error::Error, "the bridge stays");
        }
    }
}

fn socket_path(config: &config::Plugin) -> PathBuf {
    config.state_dir.join("node.sock")
}

struct Prepared {
    docker: Docker,
    instance: String,
    name: String,
    init: PathBuf,
    link_dir: PathBuf,
    resolv_conf: PathBuf,
    listener: tokio::net::UnixListener,
}

impl Prepared {
    async fn make(config: &config::Plugin) -> Result<Self, Error> {
        let docker = Docker::connect(&config.endpoint).await?;
        let instance = files::instance(&config.state_dir)?;
        let init = files::install_init(&config.init_path, &config.state_dir)?;
        let resolv_conf = files::write_resolv_conf(&config.state_dir)?;
        let link_dir = files::empty_folder(&config.state_dir.join("link"))?;

        let name = format!("polydev-{instance}");
        let labels = HashMap::from([(LABEL_INSTANCE.to_owned(), instance.clone())]);
        docker
            .ensure_bridge(&name, &format!("pd-{instance}"), &labels)
            .await?;

        let path = socket_path(config);
        let listener = service::listen(&path).map_err(|source| Error::Listen { path, source })?;
        Ok(Self {
            docker,
            instance,
            name,
            init,
            link_dir,
            resolv_conf,
            listener,
        })
    }
}
