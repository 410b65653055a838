//! A plain task's `broker` block: a key that stays outside of its container.

use polydev_proto::provider::Vendor;
use polydev_transport::upstream::Upstream;
use serde::Deserialize;

use super::{
    Error, upstream,
    value::{refused, text},
};

/// Where the key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broker {
    pub provider: Vendor,
    /// Relative to the task's folder, and in `private`, which no container has.
    pub credential_file: String,
    /// Where model requests go, in place of the provider's own API.
    pub upstream: Option<Upstream>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    provider: Option<String>,
    credential_file: Option<String>,
    upstream: Option<upstream::Raw>,
}

impl Raw {
    pub(super) fn check(self) -> Result<Broker, Error> {
        let provider = self.provider.unwrap_or_default();
        let names: Vec<_> = Vendor::all().map(Vendor::name).collect();
        let allowed = format!("must be one of {}", names.join(", "));
        let parsed = Vendor::named(&provider);
        let provider = parsed.ok_or_else(|| refused("broker.provider", &provider, allowed))?;
        let file = text(self.credential_file).unwrap_or_default();
        let below = file.strip_prefix("private/").unwrap_or_default();
        if below.is_empty() || below.split('/').any(|part| ["", ".", ".."].contains(&part)) {
            let allowed = "must be a file in the task's `private` folder, such as `private/key`";
            return Err(refused("broker.credential_file", &file, allowed));
        }
        Ok(Broker {
            provider,
            credential_file: file,
            upstream: (self.upstream).map_or(Ok(None), |upstream| upstream.check("broker"))?,
        })
    }
}
