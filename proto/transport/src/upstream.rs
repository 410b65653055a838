//! The server that model requests go to in place of a provider's own, as an operator writes it.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use http::{HeaderName, HeaderValue};
use polydev_proto::{broker, provider::Vendor, upstream::base_url};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use serde::{Deserialize, Serialize};

use crate::address::is_url;

/// Most bytes of the certificates: far more than any gateway needs.
const MAX_CA: u64 = 256 << 10;

/// An `upstream` of a slot or of a role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// Without a slash at the end, once it is checked.
    pub base_url: String,
    /// Certificates of the authorities that are trusted there, in place of the system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// Added to every request.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// The HTTP proxy on the way there.
    #[serde(default)]
    pub proxy: Option<String>,
}

/// A field that is not allowed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`upstream.{field}` is `{given}`; {allowed}")]
pub struct Invalid {
    pub field: &'static str,
    pub given: String,
    pub allowed: String,
}

/// Why the certificates of the authorities cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    #[error("cannot read `{path}`, given in `upstream.ca_file`")]
    File { path: PathBuf, source: io::Error },
    #[error(
        "`{path}`, given in `upstream.ca_file`, must have certificates in PEM, and at most {MAX_CA} bytes"
    )]
    Content { path: PathBuf },
}

impl Upstream {
    /// Checks what was given: a key leaves the machine by TLS alone.
    ///
    /// # Errors
    /// [`Invalid`]
    pub fn check(self) -> Result<Self, Invalid> {
        let refused = |field, given: &str, allowed: &str| Invalid {
            field,
            given: given.to_owned(),
            allowed: allowed.to_owned(),
        };
        let base_url = base_url(&self.base_url)
            .map_err(|error| refused("base_url", &self.base_url, &error.to_string()))?;
        if let Some(proxy) = &self.proxy {
            // By a proxy, a key would leave the machine in the clear.
            if !base_url.starts_with("https://") {
                let allowed = "allowed only with an https `base_url`";
                return Err(refused("proxy", proxy, allowed));
            }
            if !is_url("http", proxy) {
                // It may have a password.
                let shown = if proxy.contains('@') { "..." } else { proxy };
                return Err(refused("proxy", shown, "must be http://HOST:PORT"));
            }
        }
        for (name, value) in &self.headers {
            let is_header = name.parse::<HeaderName>().is_ok();
            if !is_header || value.parse::<HeaderValue>().is_err() {
                let allowed = "must be a header's name, with a value of visible characters";
                return Err(refused("headers", name, allowed));
            }
        }
        if let Some(path) = self.ca_file.as_ref().filter(|path| !path.is_absolute()) {
            let given = path.display().to_string();
            return Err(refused("ca_file", &given, "must be an absolute path"));
        }
        Ok(Self { base_url, ..self })
    }

    /// What the broker is told, with the certificates as they are now.
    ///
    /// # Errors
    /// [`Unreadable`]
    pub fn read(&self, provider: Vendor) -> Result<broker::Upstream, Unreadable> {
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
    let mut roots = RootCertStore::empty();
    let all_trusted = CertificateDer::pem_slice_iter(&content)
        .all(|certificate| certificate.is_ok_and(|known| roots.add(known).is_ok()));
    if size as u64 > MAX_CA || !all_trusted || roots.is_empty() {
        return Err(Unreadable::Content {
            path: path.to_owned(),
        });
    }
    Ok(content)
}
