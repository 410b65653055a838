//! Which of the node's images are polydev's, which of them nothing uses, and their removal.

use super::{Error, Images};
use crate::docker::Stored;

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
#[derive(Debug)]
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
        let ours = stored.into_iter().map(|mut image| {
            let of_this = fetched.iter().filter(|(_, id)| *id == image.id);
            let names: Vec<_> = of_this.map(|(name, _)| name.clone()).collect();
            if image.tags.is_empty() {
                // A job has named it by its digest, which Docker does not count as a tag.
                let is_digest = |name: &&String| name.contains('@');
                image.tags = names.iter().filter(is_digest).cloned().collect();
            }
            Ours {
                in_use: image.has_container || used.iter().any(|(_, id)| *id == image.id),
                fetched: !names.is_empty(),
                image,
            }
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

    /// Removes what nothing uses: images without a name, with `all` also those with. Without
    /// `remove`, only says which.
    ///
    /// # Errors
    /// [`Error::Docker`]
    ///
    /// # Cancel safety
    /// Images that were removed until then are gone.
    pub async fn prune(&self, all: bool, remove: bool) -> Result<Pruned, Error> {
        let is_asked = |ours: &Ours| !ours.in_use && (all || ours.image.tags.is_empty());
        let mut pruned = Pruned {
            images: Vec::new(),
            reclaimed: Some(0),
        };
        for ours in self.ours().await?.into_iter().filter(is_asked) {
            let removed = match remove {
                true => self.remove_if(&ours.image.id, is_asked).await?,
                false => Some(ours),
            };
            let Some(ours) = removed else { continue };
            let sum = pruned.reclaimed.zip(ours.image.unique);
            pruned.reclaimed = sum.map(|(sum, unique)| sum + unique);
            pruned.images.push(ours);
        }
        if remove {
            self.forget_missing().await?;
        }
        Ok(pruned)
    }

    /// Removes an image with all its tags, if it still is what is asked for. Returns what it was;
    /// `None` if it stays.
    async fn remove_if(
        &self,
        id: &str,
        is_asked: impl Fn(&Ours) -> bool,
    ) -> Result<Option<Ours>, Error> {
        let _nobody_begins_to_use_one = self.removal.write().await;
        // Tags may have moved meanwhile, and what it shares may be less.
        let now = self
            .ours()
            .await?
            .into_iter()
            .find(|one| one.image.id == id);
        let Some(ours) = now.filter(is_asked) else {
            return Ok(None);
        };
        let references = match ours.image.tags.is_empty() {
            true => std::slice::from_ref(&ours.image.id),
            false => &*ours.image.tags,
        };
        for reference in references {
            let removed = self.docker.remove_image(reference).await;
            if !removed.map_err(|error| Error::Docker(error.into()))? {
                // Such as the base of another image.
                tracing::info!(
                    image = reference,
                    "keeping the image, because something uses it"
                );
                return Ok(None);
            }
            tracing::info!(image = reference, "removed an unused image, as asked");
        }
        Ok(Some(ours))
    }

    /// Forgets that the driver has fetched what is not there any more.
    async fn forget_missing(&self) -> Result<(), Error> {
        let fetched: Vec<_> = self.lock().fetched.iter().cloned().collect();
        let there = self.ids(fetched.clone()).await?;
        let is_gone = |name: &&String| !there.iter().any(|(known, _)| known == *name);
        let gone: Vec<_> = fetched.iter().filter(is_gone).collect();
        if !gone.is_empty() {
            self.lock().fetched.retain(|name| !gone.contains(&name));
            self.save();
        }
        Ok(())
    }

    /// The references that are on the node, with their ids.
    async fn ids(&self, references: Vec<String>) -> Result<Vec<(String, String)>, Error> {
        let mut ids = Vec::new();
        for reference in references {
            match self.docker.image(&reference).await {
                Ok(image) => ids.push((reference, image.id)),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(Error::Docker(error.into())),
            }
        }
        Ok(ids)
    }
}
