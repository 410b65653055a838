//! The server that a pool's model requests go to, in place of its provider's own.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use http::{HeaderName, HeaderValue};
use polydev_proto::{broker, provider::Provider, upstream::base_url};
use serde::Deserialize;

use super::{
    Error,
    value::{self, Maps, absolute, merged, text},
};

/// A `slot.upstream` block.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, Deserialize)]
pub struct Upstream {
    /// Without a slash at the end.
    pub base_url: String,
    /// Certificates of the authorities that are trusted there, in place of the system's.
    pub ca_file: Option<PathBuf>,
    /// Added to every request.
    pub headers: BTreeMap<String, String>,
    /// The HTTP proxy on the way there.
    pub proxy: Option<String>,
}

/// Most bytes of the certificates: far more than any gateway needs.
const MAX_CA: u64 = 256 << 10;

/// Why the certificates of the authorities cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    #[error("cannot read `{path}`, given in `slot.upstream.ca_file`")]
    File { path: PathBuf, source: io::Error },
    #[error(
        "`{path}`, given in `slot.upstream.ca_file`, must have certificates in PEM, and at most {MAX_CA} bytes"
    )]
    Content { path: PathBuf },
}

impl Upstream {
    /// What the broker is told, with the certificates as they are now.
    ///
    /// # Errors
    /// [`Unreadable`]
    pub fn read(&self, provider: Provider) -> Result<broker::Upstream, Unreadable> {
        let ca = self.ca_file.as_deref().map(certificates).transpose()?;
        Ok(broker::Upstream {
            provider: provider.to_string(),
            base_url: self.base_url.clone(),
            ca: ca.unwrap_or_default().into(),
            headers: self.headers.clone(),
            proxy: self.proxy.clone().unwrap_or_default(),
        })
    }
}

/// Without a certificate the broker would trust the system's authorities.
fn certificates(path: &Path) -> Result<Vec<u8>, Unreadable> {
    let mut content = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_CA + 1).read_to_end(&mut content));
    let size = read.map_err(|source| Unreadable::File {
        path: path.to_owned(),
        source,
    })?;
    let begins = String::from_utf8_lossy(&content).find("-----BEGIN CERTIFICATE-----");
    if size as u64 > MAX_CA || begins.is_none() {
        return Err(Unreadable::Content {
            path: path.to_owned(),
        });
    }
    Ok(content)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    base_url: Option<String>,
    ca_file: Option<String>,
    headers: Maps,
    proxy: Option<String>,
}

impl Raw {
    /// `None` if the block is empty, so that a job can leave it to a variable.
    pub(super) fn check(self) -> Result<Option<Upstream>, Error> {
        let refused = |field: &str, given: &str, allowed: &str| {
            value::refused(format!("slot.upstream.{field}"), given, allowed)
        };
        let (ca_file, proxy, headers) =
            (text(self.ca_file), text(self.proxy), merged(self.headers));
        let Some(given) = text(self.base_url) else {
            if ca_file.is_none() && proxy.is_none() && headers.is_empty() {
                return Ok(None);
            }
            let allowed = "must be set beside `ca_file`, `headers` or `proxy`";
            return Err(refused("base_url", "", allowed));
        };
        let base_url =
            base_url(&given).map_err(|error| refused("base_url", &given, &error.to_string()))?;
        if let Some(proxy) = &proxy {
            // By a proxy, a key would leave the machine in the clear.
            if !base_url.starts_with("https://") {
                return Err(refused(
                    "proxy",
                    proxy,
                    "allowed only with an https `base_url`",
                ));
            }
            if !value::is_url("http", proxy) {
                return Err(refused("proxy", proxy, "must be http://HOST:PORT"));
            }
        }
        for (name, value) in &headers {
            let is_header = name.parse::<HeaderName>().is_ok();
            if !is_header || value.parse::<HeaderValue>().is_err() {
                let allowed = "must be a header's name, with a value of visible characters";
                return Err(refused("headers", name, allowed));
            }
        }
        let ca_file = ca_file.map(|path| absolute("slot.upstream.ca_file", &path));
        Ok(Some(Upstream {
            base_url,
            ca_file: ca_file.transpose()?,
            headers,
            proxy,
        }))
    }
}
