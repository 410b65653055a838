//! Where the plugin accepts shims, on other machines and on this one.

use std::net::SocketAddr;

use nix::unistd::{Gid, Group};
use polydev_transport::{address::is_url, names::Pattern, tls::Files};
use serde::Deserialize;

use super::{
    Error,
    value::{absolute, refused, text},
};

/// The address of the node service for shims on other machines, and which shims it accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shims {
    pub listen: SocketAddr,
    /// `https://HOST:PORT`, as shims reach it.
    pub advertise: String,
    pub files: Files,
    /// The names in shims' certificates.
    pub allow: Vec<Pattern>,
}

/// The plugin's `socket_group`.
pub(super) fn group(name: String) -> Result<Gid, Error> {
    match Group::from_name(&name) {
        Ok(Some(group)) => Ok(group.gid),
        _ => {
            let allowed = "must be a group of this machine";
            Err(refused("socket_group", name, allowed))
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawShims {
    listen: Option<String>,
    advertise: Option<String>,
    cert: Option<String>,
    key: Option<String>,
    ca: Option<String>,
    crl: Option<String>,
    allow: Option<Vec<Pattern>>,
}

impl RawShims {
    pub(super) fn check(self) -> Result<Shims, Error> {
        let file = |field: &str, given: Option<String>| {
            absolute(field, given.as_deref().unwrap_or_default())
        };
        let given = text(self.listen).unwrap_or_default();
        let allowed = "must be an IP address and a port, such as 192.0.2.1:7646";
        let listen = given.parse::<SocketAddr>();
        let listen = listen.map_err(|_| refused("shims.listen", given, allowed))?;
        let advertise = match text(self.advertise) {
            Some(given) if is_url("https", &given) => given,
            Some(given) => {
                return Err(refused(
                    "shims.advertise",
                    given,
                    "must be https://HOST:PORT",
                ));
            }
            None if listen.ip().is_unspecified() => {
                let allowed = "must be https://HOST:PORT, because `shims.listen` is every address";
                return Err(refused("shims.advertise", "missing", allowed));
            }
            None => format!("https://{listen}"),
        };
        let allow = self.allow.unwrap_or_default();
        if allow.is_empty() {
            let allowed = "must list at least one name from the shims' certificates";
            return Err(refused("shims.allow", "empty", allowed));
        }
        Ok(Shims {
            listen,
            advertise,
            files: Files {
                certificate: file("shims.cert", self.cert)?,
                key: file("shims.key", self.key)?,
                authority: file("shims.ca", self.ca)?,
                revoked: text(self.crl)
                    .map(|path| absolute("shims.crl", &path))
                    .transpose()?,
            },
            allow,
        })
    }
}
