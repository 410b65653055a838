//! The server that model requests go to, in place of their provider's own.

use polydev_transport::upstream::Upstream;
use serde::Deserialize;

use super::{
    Error,
    value::{self, Maps, merged, text},
};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    base_url: Option<String>,
    ca_file: Option<String>,
    headers: Maps,
    proxy: Option<String>,
}

impl Raw {
    /// `block` is where it is. `None` if it is empty, so that a job can leave it to a variable.
    pub(super) fn check(self, block: &str) -> Result<Option<Upstream>, Error> {
        let refused = |field: &str, given: &str, allowed: &str| {
            value::refused(format!("{block}.upstream.{field}"), given, allowed)
        };
        let (ca_file, proxy, headers) =
            (text(self.ca_file), text(self.proxy), merged(self.headers));
        let Some(base_url) = text(self.base_url) else {
            if ca_file.is_none() && proxy.is_none() && headers.is_empty() {
                return Ok(None);
            }
            let allowed = "must be set beside `ca_file`, `headers` or `proxy`";
            return Err(refused("base_url", "", allowed));
        };
        let given = Upstream {
            base_url,
            ca_file: ca_file.map(Into::into),
            headers,
            proxy,
        };
        let checked = given.check();
        checked
            .map(Some)
            .map_err(|invalid| refused(invalid.field, &invalid.given, &invalid.allowed))
    }
}
