//! A warm slot, as described in its job.

use serde::Deserialize;
use uuid::Uuid;

use super::{Error, PROVIDERS, value};

/// What the containers of a slot have in common.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, Deserialize)]
pub struct Slot {
    /// One of [`PROVIDERS`].
    pub provider: String,
    /// Image reference.
    pub image: String,
    /// Only for a slot on demand: the run that gets it. The slot ends with this run.
    pub run_id: Option<String>,
    /// Whether the next container is made during a run, if the node has room.
    #[serde(default)] // Nomad may have stored the slot before the option existed.
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
            let allowed = "must be the UUID of a run, for a slot on demand";
            return Err(value::refused("slot.run_id", run_id, allowed));
        }
        let prepare_ahead = self.prepare_ahead.unwrap_or(false);
        if prepare_ahead && run_id.is_some() {
            let allowed = "must be `false` if `slot.run_id` is set, because a slot on demand has one container";
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
