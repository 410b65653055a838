//! A warm slot, as its job describes it.

use serde::Deserialize;

use super::{Error, PROVIDERS, value};

/// What every container of a slot is made of.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, Deserialize)]
pub struct Slot {
    /// One of [`PROVIDERS`].
    pub provider: String,
    /// Image reference.
    pub image: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    provider: Option<String>,
    image: Option<String>,
}

impl Raw {
    pub(super) fn check(self) -> Result<Slot, Error> {
        let provider = self.provider.unwrap_or_default();
        value::one_of("slot.provider", &provider, &PROVIDERS)?;
        let image = value::text(self.image);
        let image = image.unwrap_or_else(|| format!("polydev-{provider}-runtime:latest"));
        Ok(Slot { provider, image })
    }
}
