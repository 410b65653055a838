//! The node's images: shared pulls, references and garbage collection.
//!
//! The driver removes only images that it fetched itself; an image that an operator built
//! or loaded on the node stays. A file records the fetched images, and tasks and slots know
//! what they use, so a restart loses neither.

mod auth;
mod hygiene;

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::RwLock,
    time::{sleep, timeout},
};

pub use hygiene::{Ours, Pruned};

use crate::{
    config,
    docker::{self, Docker, Image, is_latest},
    state::files,
};

/// How often the log reports the progress of a pull.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

/// How long until the next check of an image that a container uses without being in our
/// books. It is a container of someone else, or of a task whose image name now points to a
/// newer image.
const IN_USE_INTERVAL: Duration = Duration::from_secs(10 * 60);

/// Why a task's image is not available.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Of the pull; it names the image.
    #[error(transparent)]
    Pull(Arc<docker::Error>),
    #[error("cannot pull image `{image}`: not finished within {}", humantime::format_duration(*after))]
    TimedOut { image: String, after: Duration },
    #[error("no credentials for image `{image}`")]
    Auth {
        image: String,
        source: Arc<auth::Error>,
    },
    #[error("cannot load `{path}`")]
    Archive {
        path: PathBuf,
        source: Arc<io::Error>,
    },
    #[error("cannot load `{path}`")]
    Load {
        path: PathBuf,
        source: Arc<docker::Error>,
    },
    #[error("the archive `{path}` given in `load` does not contain image `{image}`")]
    NotInArchive { path: PathBuf, image: String },
    #[error(transparent)]
    Docker(Arc<docker::Error>),
}

impl Error {
    /// Whether another attempt may succeed without a change to the job.
    #[must_use]
    pub fn is_recoverable(&self) -> bool {
        match self {
            Self::Pull(source) => !source.is_missing_image(),
            Self::TimedOut { .. } | Self::Docker(_) | Self::Auth { .. } => true,
            Self::Load { source, .. } => !source.is_refused(),
            Self::Archive { .. } | Self::NotInArchive { .. } => false,
        }
    }
}

/// What a task or slot requests.
#[derive(Debug, Clone)]
pub struct Want<'a> {
    pub reference: &'a str,
    pub policy: Policy,
    /// Loaded instead of a pull.
    pub archive: Option<Archive>,
    pub auth: Option<&'a config::TaskAuth>,
    pub auth_soft_fail: bool,
    /// `None`: the plugin's timeout.
    pub timeout: Option<Duration>,
}

/// An image archive on the host: a regular file, open for reading, so that nobody can put
/// another in its place.
#[derive(Debug, Clone)]
pub struct Archive {
    pub path: PathBuf,
    pub file: Arc<File>,
}

/// When the driver contacts a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// If the node does not have the image.
    IfMissing,
    /// Also if the tag is `latest`, as Nomad's Docker driver does.
    IfMissingOrLatest,
    Always,
}

/// A step that a task's events report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Downloading,
    Downloaded { after: Duration },
    Loading,
}

impl Step {
    /// The text for the task's events.
    #[must_use]
    pub fn message(&self, image: &str) -> String {
        match self {
            Self::Downloading => format!("Downloading image {image}"),
            Self::Downloaded { after } => {
                format!("Downloaded image {image} in {:.1} s", after.as_secs_f64())
            }
            Self::Loading => format!("Loading image {image}"),
        }
    }
}

type Pull = Shared<BoxFuture<'static, Result<(), Arc<docker::Error>>>>;
type WeakPull = WeakShared<BoxFuture<'static, Result<(), Arc<docker::Error>>>>;

/// Shared by everything on the node.
#[derive(Debug)]
pub struct Images {
    docker: Docker,
    auth: config::Auth,
    gc: Option<Duration>,
    pull_timeout: Duration,
    activity_timeout: Duration,
    /// The file that records `state.fetched`.
    file: PathBuf,
    state: Mutex<State>,
    /// Held for writing while an image is being removed.
    removal: RwLock<()>,
}

#[derive(Debug, Default)]
struct State {
    /// By reference and credentials: a registry may refuse one user and serve another.
    pulls: HashMap<(String, Option<docker::Credentials>), WeakPull>,
    uses: HashMap<String, Uses>,
    fetched: BTreeSet<String>,
}

#[derive(Debug, Default)]
struct Uses {
    count: usize,
    /// Changes with each use, so that a delayed removal can see that it is out of date.
    version: u64,
}

/// Protects an image from removal until it is dropped.
#[derive(Debug)]
pub struct Use {
    images: Arc<Images>,
    reference: String,
}

impl Images {
    /// Reads which images an earlier life of the driver fetched.
    #[must_use]
    pub fn new(config: &config::Plugin, docker: Docker) -> Arc<Self> {
        let file = config.state_dir.join("images.json");
        let fetched = fs::read(&file)
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok());
        Arc::new(Self {
            docker,
            auth: config.auth.clone(),
            gc: config.gc.image.then_some(config.gc.image_delay),
            pull_timeout: config.image_pull_timeout,
            activity_timeout: config.pull_activity_timeout,
            file,
            state: Mutex::new(State {
                fetched: fetched.unwrap_or_default(),
                ..State::default()
            }),
            removal: RwLock::new(()),
        })
    }

    /// Schedules the removal of fetched images that have no user after a restart.
    pub fn collect(self: &Arc<Self>) {
        let fetched = self.lock().fetched.clone();
        for reference in fetched {
            drop(self.hold(&reference));
        }
    }

    /// Ensures that the image is on the node and protects it as long as the result lives.
    /// `tell` receives the steps that take time.
    ///
    /// # Errors
    /// [`Error`]
    ///
    /// # Cancel safety
    /// A pull ends when no caller waits for it any longer.
    pub async fn get(
        self: &Arc<Self>,
        want: &Want<'_>,
        tell: impl Fn(Step),
    ) -> Result<(Image, Use), Error> {
        let reference = want.reference;
        let held = {
            let _not_being_removed = self.removal.read().await;
            self.hold(reference)
        };
        let asks = match want.policy {
            Policy::Always => true,
            Policy::IfMissingOrLatest => is_latest(reference),
            Policy::IfMissing => false,
        };
        let before = match self.docker.image(reference).await {
            Ok(image) if !asks => return Ok((image, held)),
            Ok(image) => Some(image),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(Error::Docker(error.into())),
        };
        match &want.archive {
            Some(archive) => {
                tell(Step::Loading);
                self.load(archive, want.timeout).await?;
            }
            None => {
                tell(Step::Downloading);
                let begin = Instant::now();
                self.pull(want).await?;
                let after = begin.elapsed();
                tell(Step::Downloaded { after });
            }
        }
        let image = match (self.docker.image(reference).await, &want.archive) {
            (Err(error), Some(archive)) if error.is_not_found() => {
                return Err(Error::NotInArchive {
                    path: archive.path.clone(),
                    image: reference.to_owned(),
                });
            }
            (image, _) => image.map_err(|error| Error::Docker(error.into()))?,
        };
        match before {
            None => self.remember(reference),
            // The reference now names the new image.
            Some(old) if old.id != image.id && self.lock().fetched.contains(reference) => {
                self.remember(&old.id);
                drop(self.hold(&old.id));
            }
            Some(_) => {}
        }
        Ok((image, held))
    }

    /// Protects an image from removal.
    #[must_use]
    pub fn hold(self: &Arc<Self>, reference: &str) -> Use {
        let mut state = self.lock();
        let uses = state.uses.entry(reference.to_owned()).or_default();
        uses.count += 1;
        uses.version += 1;
        Use {
            images: self.clone(),
            reference: reference.to_owned(),
        }
    }

    async fn load(&self, archive: &Archive, limit: Option<Duration>) -> Result<(), Error> {
        let path = archive.path.clone();
        // Opened again, to be read from its beginning.
        let opened = format!("/proc/self/fd/{}", archive.file.as_raw_fd());
        let file = match tokio::fs::File::open(opened).await {
            Ok(file) => file,
            Err(error) => {
                let source = error.into();
                return Err(Error::Archive { path, source });
            }
        };
        let limit = limit.unwrap_or(self.pull_timeout);
        let loaded = self.docker.load(file, limit).await;
        loaded.map_err(|error| Error::Load {
            path,
            source: error.into(),
        })
    }

    async fn pull(&self, want: &Want<'_>) -> Result<(), Error> {
        let image = want.reference.to_owned();
        let credentials = match auth::find(want, &self.auth).await {
            Ok(credentials) => credentials,
            Err(error) if want.auth_soft_fail => {
                tracing::info!(error = crate::chain(&error), "pulling without credentials");
                None
            }
            Err(error) => {
                let source = error.into();
                return Err(Error::Auth { image, source });
            }
        };
        let after = want.timeout.unwrap_or(self.pull_timeout);
        match timeout(after, self.shared_pull(&image, credentials)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(Error::Pull(source)),
            Err(_) => Err(Error::TimedOut { image, after }),
        }
    }

    /// The running pull of this image with these credentials, or a new one.
    fn shared_pull(&self, reference: &str, credentials: Option<docker::Credentials>) -> Pull {
        let key = (reference.to_owned(), credentials.clone());
        let mut state = self.lock();
        state.pulls.retain(|_, pull| pull.upgrade().is_some());
        if let Some(pull) = state.pulls.get(&key).and_then(WeakPull::upgrade) {
            return pull;
        }
        let (docker, idle, image) = (
            self.docker.clone(),
            self.activity_timeout,
            reference.to_owned(),
        );
        let pull = async move {
            let mut told = Instant::now();
            let progress = |progress: docker::Progress| {
                if told.elapsed() >= PROGRESS_INTERVAL {
                    told = Instant::now();
                    let docker::Progress {
                        layers,
                        done,
                        bytes,
                    } = progress;
                    tracing::info!(image, layers, done, bytes, "pulling");
                }
            };
            docker
                .pull(&image, credentials.as_ref(), idle, progress)
                .await
                .map_err(Arc::new)
        };
        let pull = pull.boxed().shared();
        if let Some(weak) = pull.downgrade() {
            state.pulls.insert(key, weak);
        }
        pull
    }

    fn remember(&self, reference: &str) {
        if self.lock().fetched.insert(reference.to_owned()) {
            self.save();
        }
    }

    fn save(&self) {
        let fetched = self.lock().fetched.clone();
        let text = serde_json::to_vec(&fetched).expect("strings can be written as JSON");
        if let Err(error) = files::write(&self.file, &text, 0o600) {
            tracing::warn!(
                error = crate::chain(&error),
                "cannot record the fetched images; unused images may never be removed"
            );
        }
    }

    fn released(self: &Arc<Self>, reference: &str) {
        let mut state = self.lock();
        let Some(uses) = state.uses.get_mut(reference) else {
            return;
        };
        uses.count -= 1;
        let (unused, version) = (uses.count == 0, uses.version);
        if unused && !state.fetched.contains(reference) {
            state.uses.remove(reference);
            return;
        }
        drop(state);
        // Without a runtime the process is ending; the next one collects.
        if let (true, Some(delay), Ok(runtime)) =
            (unused, self.gc, tokio::runtime::Handle::try_current())
        {
            let (images, reference) = (self.clone(), reference.to_owned());
            runtime.spawn(async move {
                sleep(delay).await;
                images.remove_unused(&reference, version).await;
            });
        }
    }

    /// Removes an image unless it has been used in the meantime.
    async fn remove_unused(self: &Arc<Self>, reference: &str, version: u64) {
        let _nobody_begins_to_use_one = self.removal.write().await;
        {
            let mut state = self.lock();
            let unused = state
                .uses
                .get(reference)
                .is_some_and(|uses| uses.count == 0 && uses.version == version);
            if !unused {
                return;
            }
            state.uses.remove(reference);
        }
        match self.docker.remove_image(reference).await {
            Ok(false) => {
                tracing::debug!(
                    image = reference,
                    "keeping the image, because a container uses it"
                );
                let (images, reference) = (self.clone(), reference.to_owned());
                tokio::spawn(async move {
                    sleep(IN_USE_INTERVAL).await;
                    drop(images.hold(&reference));
                });
            }
            Ok(true) => {
                tracing::info!(image = reference, "removed an unused image");
                self.lock().fetched.remove(reference);
                self.save();
            }
            Err(error) => tracing::warn!(
                error = crate::chain(&error),
                "cannot remove an unused image"
            ),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.images.released(&self.reference);
    }
}
