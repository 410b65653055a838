//! What the containers of a pool may reach beside their model.

use polydev_proto::egress::{INTERNET, Rule};
use serde::{Deserialize, Serialize};

use super::{Error, value};

/// Most rules of one pool.
const MAX_RULES: usize = 200;

/// A `slot.egress` block.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Egress {
    /// A network interface, and all public addresses.
    #[default]
    Internet,
    /// No interface: these destinations, through the broker.
    Listed(Vec<String>),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    allow: Option<Vec<String>>,
}

impl Raw {
    /// A block without a list allows nothing.
    pub(super) fn check(self) -> Result<Egress, Error> {
        let allow = self.allow.unwrap_or_default();
        let refused =
            |given: &str, allowed: String| value::refused("slot.egress.allow", given, allowed);
        if allow == [INTERNET] {
            return Ok(Egress::Internet);
        }
        if allow.len() > MAX_RULES {
            let given = format!("a list of {}", allow.len());
            return Err(refused(
                &given,
                format!("must have at most {MAX_RULES} entries"),
            ));
        }
        for rule in &allow {
            let parsed = rule.parse::<Rule>();
            parsed.map_err(|error| refused(rule, error.to_string()))?;
        }
        Ok(Egress::Listed(allow))
    }
}
