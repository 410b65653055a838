//! Inspects, lists, pulls, loads and removes images.

use std::{collections::HashSet, time::Duration};

use bollard::{
    auth::DockerCredentials,
    body_try_stream,
    models::ImageSummary,
    query_parameters::{
        CreateImageOptionsBuilder, ImportImageOptions, ListContainersOptionsBuilder,
        ListImagesOptionsBuilder, RemoveImageOptionsBuilder,
    },
};
use futures_util::{StreamExt, TryStreamExt};
use tokio::time::timeout;

use super::{CALL_TIMEOUT, Docker, Error, within};

/// Docker adds up the layers of all images.
const LIST_TIMEOUT: Duration = Duration::from_secs(60);

/// The facts about an image that the driver uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image {
    /// Digest of its content.
    pub id: String,
    /// A number or a name, as in the image; empty means root.
    pub user: String,
    pub entrypoint: Vec<String>,
    pub command: Vec<String>,
    /// Name of the signal that requests a stop.
    pub stop_signal: Option<String>,
}

/// Credentials for a registry.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// [`TOKEN_USER`] if the password is an identity token.
    pub username: String,
    pub password: String,
    pub server: Option<String>,
}

/// The user name with which Docker's credential helpers mark an identity token.
pub const TOKEN_USER: &str = "<token>";

impl Credentials {
    fn to_api(&self) -> DockerCredentials {
        let (name, secret) = (Some(self.username.clone()), Some(self.password.clone()));
        let serveraddress = self.server.clone();
        if self.username == TOKEN_USER {
            DockerCredentials {
                identitytoken: secret,
                serveraddress,
                ..Default::default()
            }
        } else {
            DockerCredentials {
                username: name,
                password: secret,
                serveraddress,
                ..Default::default()
            }
        }
    }
}

/// Hides the password.
impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials")
            .field("username", &self.username)
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}

/// The progress of a pull.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    pub layers: usize,
    pub done: usize,
    /// Bytes fetched so far, of all layers that report them.
    pub bytes: i64,
}

/// An image of this node.
#[derive(Debug, Clone)]
pub struct Stored {
    pub id: String,
    pub tags: Vec<String>,
    /// In bytes, with layers that other images have too.
    pub size: u64,
    /// In bytes, without those; `None` if Docker does not say.
    pub unique: Option<u64>,
    /// In seconds since 1970.
    pub created: i64,
    pub has_container: bool,
    /// The names of its labels.
    pub labels: Vec<String>,
}

impl Docker {
    /// # Errors
    /// [`Error`]; [`Error::is_not_found`] if the image is not on this node.
    pub async fn image(&self, reference: &str) -> Result<Image, Error> {
        let operation = format!("inspect image `{reference}`");
        let image = within(
            CALL_TIMEOUT,
            operation,
            self.api()?.inspect_image(reference),
        )
        .await?;
        let config = image.config.unwrap_or_default();
        Ok(Image {
            id: image.id.unwrap_or_default(),
            user: config.user.unwrap_or_default(),
            entrypoint: config.entrypoint.unwrap_or_default(),
            command: config.cmd.unwrap_or_default(),
            stop_signal: config.stop_signal.filter(|signal| !signal.is_empty()),
        })
    }

    /// Pulls an image and reports every step to `told`. Fails if there is no progress for
    /// `idle`.
    ///
    /// # Errors
    /// [`Error`] if the registry cannot be reached, rejects the request, or does not have
    /// the image.
    ///
    /// # Cancel safety
    /// Cancelling also ends dockerd's pull.
    pub async fn pull(
        &self,
        reference: &str,
        credentials: Option<&Credentials>,
        idle: Duration,
        mut told: impl FnMut(Progress),
    ) -> Result<(), Error> {
        let operation = || format!("pull image `{reference}`");
        let options = CreateImageOptionsBuilder::new()
            .from_image(reference)
            .tag(default_tag(reference))
            .build();
        let credentials = credentials.map(Credentials::to_api);
        // dockerd responds only after the registry does.
        let api = self.api()?.clone().with_timeout(idle);
        let steps = api.create_image(Some(options), None, credentials);
        let mut steps = std::pin::pin!(steps);
        let mut layers = std::collections::HashMap::new();
        loop {
            let Ok(step) = timeout(idle, steps.next()).await else {
                return Err(Error::Stalled {
                    operation: operation(),
                    after: idle,
                });
            };
            let step = match step {
                Some(Ok(step)) => step,
                Some(Err(source)) => {
                    return Err(Error::Call {
                        operation: operation(),
                        source,
                    });
                }
                None => return Ok(()),
            };
            if let Some(layer) = step.id {
                let fetched = step.progress_detail.and_then(|detail| detail.current);
                let status = step.status.unwrap_or_default();
                let is_done = matches!(&*status, "Pull complete" | "Already exists");
                let known = layers.entry(layer).or_insert((0, false));
                *known = (fetched.unwrap_or(known.0), is_done);
                told(Progress {
                    layers: layers.len(),
                    done: layers.values().filter(|layer| layer.1).count(),
                    bytes: layers.values().map(|layer| layer.0).sum(),
                });
            }
        }
    }

    /// Loads the images of an archive, as `docker load` does.
    ///
    /// # Errors
    /// [`Error`] if the file cannot be read or Docker does not accept it.
    pub async fn load(&self, archive: tokio::fs::File, limit: Duration) -> Result<(), Error> {
        let bytes = futures_util::stream::try_unfold(archive, |mut archive| async move {
            use tokio::io::AsyncReadExt;
            let mut chunk = bytes::BytesMut::with_capacity(256 << 10);
            let count = archive.read_buf(&mut chunk).await?;
            Ok::<_, std::io::Error>((count > 0).then(|| (chunk.freeze(), archive)))
        });
        let options = ImportImageOptions::default();
        // dockerd responds after it has unpacked the archive.
        let api = self.api()?.clone().with_timeout(limit);
        let steps = api.import_image(options, body_try_stream(bytes), None);
        let done = steps.try_for_each(|_| std::future::ready(Ok(())));
        within(limit, "load an image archive", done).await
    }

    /// Creates an image from one static program.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn import(&self, reference: &str, archive: Vec<u8>) -> Result<(), Error> {
        let (repository, tag) = reference.rsplit_once(':').unwrap_or((reference, "latest"));
        let options = CreateImageOptionsBuilder::new()
            .from_src("-")
            .repo(repository)
            .tag(tag)
            .build();
        let body = bollard::body_full(archive.into());
        let steps = self.api()?.create_image(Some(options), Some(body), None);
        let done = steps.try_for_each(|_| std::future::ready(Ok(())));
        within(CALL_TIMEOUT, format!("import image `{reference}`"), done).await
    }

    /// All images of this node that are not steps of a build.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn images(&self) -> Result<Vec<Stored>, Error> {
        let options = ListImagesOptionsBuilder::new().shared_size(true).build();
        let listed = self.api()?.list_images(Some(options));
        let images = within(LIST_TIMEOUT, "list the images", listed).await?;
        let options = ListContainersOptionsBuilder::new().all(true).build();
        let listed = self.api()?.list_containers(Some(options));
        let containers = within(LIST_TIMEOUT, "list the containers", listed).await?;
        let in_use: HashSet<_> = containers
            .into_iter()
            .filter_map(|one| one.image_id)
            .collect();
        let stored = |image: ImageSummary| {
            let is_tag = |tag: &String| tag != "<none>:<none>";
            Stored {
                tags: image.repo_tags.into_iter().filter(is_tag).collect(),
                size: u64::try_from(image.size).unwrap_or_default(),
                // -1 if Docker does not say, as before API 1.42.
                unique: u64::try_from(image.shared_size).ok().map(|shared| {
                    u64::try_from(image.size)
                        .unwrap_or_default()
                        .saturating_sub(shared)
                }),
                created: image.created,
                has_container: in_use.contains(&image.id),
                labels: image.labels.into_keys().collect(),
                id: image.id,
            }
        };
        Ok(images.into_iter().map(stored).collect())
    }

    /// Removes a reference, and the image with its last reference. Returns false if a
    /// container uses the image; a missing image is not an error.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn remove_image(&self, reference: &str) -> Result<bool, Error> {
        let options = RemoveImageOptionsBuilder::new().force(false).build();
        let remove = self.api()?.remove_image(reference, Some(options), None);
        match within(CALL_TIMEOUT, format!("remove image `{reference}`"), remove).await {
            Err(error) if error.is_not_found() => Ok(true),
            Err(error) if error.is_conflict() => Ok(false),
            removed => removed.map(|_| true),
        }
    }
}

/// The tag to pull if the reference has none: without a tag the API would pull all tags.
fn default_tag(reference: &str) -> &'static str {
    let name = reference.rsplit('/').next().unwrap_or(reference);
    if name.contains([':', '@']) {
        ""
    } else {
        "latest"
    }
}

/// Whether a reference's content may change: it has no digest, and no tag except `latest`.
#[must_use]
pub fn is_latest(reference: &str) -> bool {
    default_tag(reference) == "latest"
        || (reference.ends_with(":latest") && !reference.contains('@'))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C044: tells tags, digests and registry ports apart.
    #[test]
    fn references_without_a_tag_mean_latest() {
        for (reference, tag, latest) in [
            ("busybox", "latest", true),
            ("library/hello-world", "latest", true),
            ("host:5000/a/b", "latest", true),
            ("host:5000/a/b:1.0", "", false),
            ("host:5000/a/b:latest", "", true),
            ("busybox:latest", "", true),
            ("host:5000/a/b@sha256:0123", "", false),
            ("host:5000/a/b:latest@sha256:0123", "", false),
        ] {
            assert_eq!(default_tag(reference), tag, "{reference}");
            assert_eq!(is_latest(reference), latest, "{reference}");
        }
    }
}
