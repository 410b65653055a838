//! A warm slot, as its job describes it.

use serde::Deserialize;
use uuid::Uuid;

use super::{Error, PROVIDERS, value};

/// What every container of a slot is made of.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, Deserialize)]
pub struct Slot {
    /// One of [`PROVIDERS`].
    pub provider: String,
    /// Image reference.
    pub image: String,
    /// Of a slot that is made on demand: the one run that gets it, after which it is gone.
    pub run_id: Option<String>,
    /// Whether the next container is made while a run goes on, if the node has room.
    #[serde(default)] // Nomad keeps this, also from drivers that did not know the option.
    pub prepare_ahead: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    provider: Option<String>,
    image: Option<String>,
    run_id: Option<String>,
    prepare_ahead: Option<bool>,
}

impl Raw {
    pub(super) fn check(self) -> Result<Slot, Error> {
        let provider = self.provider.unwrap_or_default();
        value::one_of("slot.provider", &provider, &PROVIDERS)?;
        let image = value::text(self.image);
        let image = image.unwrap_or_else(|| format!("polydev-{provider}-runtime:latest"));
        let run_id = value::text(self.run_id);
        if let Some(run_id) = run_id.as_ref().filter(|id| Uuid::parse_str(id).is_err()) {
            let allowed = "the UUID of a run, for a slot that is made on demand";
            return Err(value::refused("slot.run_id", run_id, allowed));
        }
        let prepare_ahead = self.prepare_ahead.unwrap_or(false);
        if prepare_ahead && run_id.is_some() {
            let allowed = "`false` beside `slot.run_id`: a slot on demand has one container";
            return Err(value::refused("slot.prepare_ahead", "true", allowed));
        }
        Ok(Slot {
            provider,
            image,
            run_id,
            prepare_ahead,
        })
    }
}
