//! The network of a group: a namespace that Nomad asks for, configures with CNI and
//! gives to every task of the group. Docker joins namespaces of containers only, so
//! that a container holds it: our init as a program that sleeps, in an image made of
//! nothing else, so that no registry is needed.

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{
    docker::{self, SandboxSpec},
    identity::{LABEL_INSTANCE, LABEL_NETWORK},
    node::Node,
};

/// Under these labels Nomad looks for what it writes into the group's hosts file.
pub(crate) const LABEL_CONTAINER: &str = "docker_sandbox_container_id";
const LABEL_HOSTNAME: &str = "docker_sandbox_hostname";

/// Why a group has no network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot make the group's network")]
    Docker(#[from] docker::Error),
    #[error("cannot read `{path}`")]
    Init { path: PathBuf, source: io::Error },
    #[error("the container of the group's network ended at once")]
    Ended,
    #[error("a container named `{name}` is there already, and is not this driver's")]
    Taken { name: String },
}

/// A group's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// File of the namespace.
    pub namespace: String,
    pub labels: HashMap<String, String>,
    /// It was not there before.
    pub created: bool,
}

/// The networks that Nomad has asked for and not given back, kept in a file: Nomad does
/// not ask again after a restart of the driver.
#[derive(Debug)]
pub struct Networks {
    file: PathBuf,
    alloc_ids: Mutex<BTreeSet<String>>,
}

impl Networks {
    /// Reads what an earlier life of the driver held.
    #[must_use]
    pub fn open(state_dir: &Path) -> Self {
        let file = state_dir.join("networks.json");
        let kept = fs::read(&file)
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok());
        Self {
            file,
            alloc_ids: Mutex::new(kept.unwrap_or_default()),
        }
    }

    #[must_use]
    pub fn holds(&self, alloc_id: &str) -> bool {
        self.lock().contains(alloc_id)
    }

    fn add(&self, alloc_id: &str) {
        self.lock().insert(alloc_id.to_owned());
        self.save();
    }

    fn remove(&self, alloc_id: &str) {
        self.lock().remove(alloc_id);
        self.save();
    }

    fn save(&self) {
        let text = serde_json::to_vec(&*self.lock()).expect("strings can be written as JSON");
        if let Err(error) = crate::node::files::write(&self.file, &text, 0o600) {
            tracing::warn!(error = crate::chain(&error), "networks may be forgotten");
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.alloc_ids
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the network of an allocation, or finds the one that is there.
///
/// # Errors
/// [`Error`]
pub async fn create(node: &Node, alloc_id: &str, hostname: &str) -> Result<Network, Error> {
    node.networks.add(alloc_id);
    let made = make(node, alloc_id, hostname).await;
    if made.is_err() {
        // What is left of it is the reaper's.
        node.networks.remove(alloc_id);
    }
    made
}

async fn make(node: &Node, alloc_id: &str, hostname: &str) -> Result<Network, Error> {
    let image = ensure_image(node).await?;
    let spec = SandboxSpec {
        name: format!("polydev-network-{}", alloc_id.replace('-', "")),
        image,
        command: vec!["/polydev-init".into(), "pause".into()],
        labels: HashMap::from([
            (LABEL_INSTANCE.to_owned(), node.instance.clone()),
            (LABEL_NETWORK.to_owned(), alloc_id.to_owned()),
        ]),
        hostname: hostname.to_owned(),
    };
    let mut created = true;
    match node.docker.create_sandbox(&spec).await {
        Ok(_) => {}
        Err(error) if error.is_conflict() => {
            if node.docker.labels(&spec.name).await?.get(LABEL_INSTANCE) != Some(&node.instance) {
                return Err(Error::Taken { name: spec.name });
            }
            created = false;
            // After a restart of dockerd or the host it is there and does not run.
            if node.docker.sandbox(&spec.name).await?.is_none() {
                node.docker.remove(&spec.name).await?;
                node.docker.create_sandbox(&spec).await?;
                created = true;
            }
        }
        Err(error) => return Err(error.into()),
    }
    if created {
        node.docker.start(&spec.name).await?;
    }
    let sandbox = node.docker.sandbox(&spec.name).await?.ok_or(Error::Ended)?;
    Ok(Network {
        namespace: sandbox.namespace,
        labels: HashMap::from([
            (LABEL_CONTAINER.to_owned(), sandbox.id),
            (LABEL_HOSTNAME.to_owned(), sandbox.hostname),
        ]),
        created,
    })
}

/// Removes a network; one that is gone is no error.
///
/// # Errors
/// [`Error`]
pub async fn destroy(
    node: &Node,
    alloc_id: &str,
    labels: &HashMap<String, String>,
) -> Result<(), Error> {
    node.networks.remove(alloc_id);
    match labels.get(LABEL_CONTAINER) {
        Some(id) => Ok(node.docker.remove(id).await?),
        None => Ok(()),
    }
}

/// An image of init alone, named by its content.
async fn ensure_image(node: &Node) -> Result<String, Error> {
    let digest = node.init.file_name().and_then(|name| name.to_str());
    let digest = digest
        .and_then(|name| name.strip_prefix("init-"))
        .unwrap_or("latest");
    let image = format!("polydev-pause:{digest}");
    match node.docker.image(&image).await {
        Ok(_) => return Ok(image),
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error.into()),
    }
    let archive = archive(&node.init).map_err(|source| Error::Init {
        path: node.init.clone(),
        source,
    })?;
    node.docker.import(&image, archive).await?;
    Ok(image)
}

fn archive(init: &std::path::Path) -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    archive.mode(tar::HeaderMode::Deterministic);
    archive.append_path_with_name(init, "polydev-init")?;
    archive.into_inner()
}
