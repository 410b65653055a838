//! Which of the node's images are polydev's, which of them nothing uses, and their removal.

use std::{collections::HashSet, sync::Arc};

use super::{Error, Images};
use crate::docker::{Stored, is_latest};

/// Labels of images that are built from polydev's Dockerfiles begin with this.
const LABEL: &str = "dev.polydev.";

/// An image that is polydev's.
#[derive(Debug, Clone)]
pub struct Ours {
    pub image: Stored,
    /// A slot, a task or any container uses it.
    pub in_use: bool,
    /// The driver has fetched it.
    pub fetched: bool,
}

/// What was, or would be, removed.
#[derive(Debug, Default)]
pub struct Pruned {
    pub images: Vec<Ours>,
    /// What these images share, or shared, with no image that is left; `None` if Docker does not
    /// say.
    pub reclaimed: Option<u64>,
}

impl Images {
    /// The largest first.
    ///
    /// # Errors
    /// [`Error::Docker`]
    pub async fn ours(&self) -> Result<Vec<Ours>, Error> {
        let stored = self.docker.images().await;
        let stored = stored.map_err(|error| Error::Docker(error.into()))?;
        let (used, fetched) = {
            let state = self.lock();
            let used = state.uses.iter().filter(|(_, uses)| uses.count > 0);
            let used: Vec<String> = used.map(|(reference, _)| reference.clone()).collect();
            (used, state.fetched.iter().cloned().collect::<Vec<_>>())
        };
        let (used, fetched) = (self.ids(used).await?, self.ids(fetched).await?);
        let ours = stored.into_iter().map(|image| Ours {
            in_use: image.has_container || used.contains(&image.id),
            fetched: fetched.contains(&image.id),
            image,
        });
        let is_built = |ours: &Ours| {
            ours.image
                .labels
                .iter()
                .any(|label| label.starts_with(LABEL))
        };
        let mut ours: Vec<_> = ours.filter(|ours| ours.fetched || is_built(ours)).collect();
        ours.sort_by_key(|ours| std::cmp::Reverse(ours.image.size));
        Ok(ours)
    }

    /// Removes what nothing uses: images without a tag, with `all` also those with. Without
    /// `remove`, only says which.
    ///
    /// # Errors
    /// [`Error::Docker`]
    ///
    /// # Cancel safety
    /// Images that were removed until then are gone.
    pub async fn prune(self: &Arc<Self>, all: bool, remove: bool) -> Result<Pruned, Error> {
        // Nothing may begin to use one of them meanwhile.
        let _nobody_begins_to_use_one = self.removal.write().await;
        let is_asked = |ours: &Ours| !ours.in_use && (all || ours.image.tags.is_empty());
        let ours = self.ours().await?.into_iter().filter(is_asked);
        let mut pruned = Pruned {
            images: Vec::new(),
            reclaimed: Some(0),
        };
        for ours in ours {
            let unique = match remove {
                true => self.remove_whole(&ours.image).await?,
                false => Some(ours.image.unique),
            };
            // One that cannot be removed, such as the base of another image, stays.
            let Some(unique) = unique else { continue };
            let sum = pruned.reclaimed.zip(unique);
            pruned.reclaimed = sum.map(|(sum, unique)| sum + unique);
            pruned.images.push(ours);
        }
        Ok(pruned)
    }

    /// Removes an image with all its tags. Returns what it shared with no other at the time, if
    /// Docker says so; `None` if the image stays.
    async fn remove_whole(&self, image: &Stored) -> Result<Option<Option<u64>>, Error> {
        let docker = |error: crate::docker::Error| Error::Docker(error.into());
        let now = self.docker.images().await.map_err(docker)?;
        let unique = now.iter().find(|one| one.id == image.id);
        let unique = unique.and_then(|one| one.unique);
        let references = match image.tags.is_empty() {
            true => std::slice::from_ref(&image.id),
            false => &*image.tags,
        };
        for reference in references {
            if !self.docker.remove_image(reference).await.map_err(docker)? {
                tracing::info!(
                    image = reference,
                    "keeping the image, because something uses it"
                );
                return Ok(None);
            }
            tracing::info!(image = reference, "removed an unused image, as asked");
            self.forget(reference);
        }
        Ok(Some(unique))
    }

    /// Forgets that the driver has fetched this, under any of its names.
    fn forget(&self, removed: &str) {
        let is_it = |fetched: &String| {
            fetched == removed || (is_latest(fetched) && removed == format!("{fetched}:latest"))
        };
        let mut state = self.lock();
        let before = state.fetched.len();
        state.fetched.retain(|fetched| !is_it(fetched));
        let has_changed = state.fetched.len() != before;
        drop(state);
        if has_changed {
            self.save();
        }
    }

    /// The ids of references that are on the node.
    async fn ids(&self, references: Vec<String>) -> Result<HashSet<String>, Error> {
        let mut ids = HashSet::new();
        for reference in references {
            match self.docker.image(&reference).await {
                Ok(image) => {
                    ids.insert(image.id);
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(Error::Docker(error.into())),
            }
        }
        Ok(ids)
    }
}
