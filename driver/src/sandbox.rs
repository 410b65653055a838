//! The network of a group: a namespace that Nomad requests, configures with CNI and gives
//! to every task of the group. Docker can only join the namespaces of containers, so a
//! container holds it. It runs init as a program that sleeps, in an image of init alone, so
//! no registry is needed.

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
};

use parking_lot::{Mutex, MutexGuard};
use tokio::time::sleep;

use crate::{
    docker::{
        self, SandboxSpec,
        name::{self, Holder},
    },
    identity::{LABEL_INSTANCE, LABEL_NETWORK, LABEL_SANDBOX},
    site::Site,
    state::files,
};

/// Nomad looks for this label to get the name that it writes into the group's hosts file.
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
    #[error("a container named `{name}` already exists and does not belong to this driver")]
    Taken { name: String },
}

/// A group's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// File of the namespace.
    pub namespace: String,
    pub labels: HashMap<String, String>,
    /// Whether this call created it.
    pub created: bool,
}

/// The networks that Nomad has requested and not yet released, kept in a file, because
/// Nomad does not request them again after a restart of the driver.
#[derive(Debug)]
pub struct Networks {
    file: PathBuf,
    alloc_ids: Mutex<BTreeSet<String>>,
}

impl Networks {
    /// Reads which networks an earlier life of the driver held.
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
        if let Err(error) = files::write(&self.file, &text, 0o600) {
            tracing::warn!(
                error = crate::chain(&error),
                "cannot record the networks; a restart may lose them"
            );
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.alloc_ids.lock()
    }
}

impl Networks {
    /// Creates the network of an allocation, or returns the existing one.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn create(
        &self,
        site: &Site,
        alloc_id: &str,
        hostname: &str,
    ) -> Result<Network, Error> {
        self.add(alloc_id);
        let made = make(site, alloc_id, hostname).await;
        if made.is_err() {
            // The reaper removes what is left.
            self.remove(alloc_id);
        }
        made
    }

    /// Removes a network; a missing network is not an error.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn destroy(
        &self,
        site: &Site,
        alloc_id: &str,
        labels: &HashMap<String, String>,
    ) -> Result<(), Error> {
        self.remove(alloc_id);
        match labels.get(LABEL_SANDBOX) {
            Some(id) => Ok(site.docker.remove(id).await?),
            None => Ok(()),
        }
    }
}

async fn make(site: &Site, alloc_id: &str, hostname: &str) -> Result<Network, Error> {
    let image = ensure_image(site).await?;
    let spec = SandboxSpec {
        name: format!("polydev-network-{}", alloc_id.replace('-', "")),
        image,
        command: vec!["/polydev-init".into(), "pause".into()],
        labels: HashMap::from([
            (LABEL_INSTANCE.to_owned(), site.instance.clone()),
            (LABEL_NETWORK.to_owned(), alloc_id.to_owned()),
        ]),
        hostname: hostname.to_owned(),
    };
    let created = create(site, &spec).await?;
    if created {
        site.docker.start(&spec.name).await?;
    }
    let sandbox = site.docker.sandbox(&spec.name).await?.ok_or(Error::Ended)?;
    Ok(Network {
        namespace: sandbox.namespace,
        labels: HashMap::from([
            (LABEL_SANDBOX.to_owned(), sandbox.id),
            (LABEL_HOSTNAME.to_owned(), sandbox.hostname),
        ]),
        created,
    })
}

/// Creates the container, or says that it already runs.
async fn create(site: &Site, spec: &SandboxSpec) -> Result<bool, Error> {
    for wait in name::waits() {
        match site.docker.create_sandbox(spec).await {
            Ok(_) => return Ok(true),
            Err(error) if error.is_conflict() => {}
            Err(error) => return Err(error.into()),
        }
        match site.docker.holder(&spec.name, &site.instance).await? {
            Holder::Other => {
                return Err(Error::Taken {
                    name: spec.name.clone(),
                });
            }
            Holder::Ours if site.docker.sandbox(&spec.name).await?.is_some() => return Ok(false),
            // After a restart of dockerd or of the host, the container exists but does not run.
            Holder::Ours => site.docker.remove(&spec.name).await?,
            Holder::Nobody => {}
        }
        sleep(wait).await;
    }
    site.docker.create_sandbox(spec).await?;
    Ok(true)
}

/// An image of init alone, named after its content.
async fn ensure_image(site: &Site) -> Result<String, Error> {
    let digest = site.init.file_name().and_then(|name| name.to_str());
    let digest = digest
        .and_then(|name| name.strip_prefix("init-"))
        .unwrap_or("latest");
    let image = format!("polydev-pause:{digest}");
    match site.docker.image(&image).await {
        Ok(_) => return Ok(image),
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error.into()),
    }
    let archive = archive(&site.init).map_err(|source| Error::Init {
        path: site.init.clone(),
        source,
    })?;
    site.docker.import(&image, archive).await?;
    Ok(image)
}

fn archive(init: &std::path::Path) -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    archive.mode(tar::HeaderMode::Deterministic);
    archive.append_path_with_name(init, "polydev-init")?;
    archive.into_inner()
}
