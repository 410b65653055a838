//! Servers that requests go to. Each run has connections of its own, which are closed with it:
//! no two users share a connection, and no buffer of one outlives the run.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use http::HeaderMap;
use polydev_proto::{
    broker::Upstream as Given,
    provider::{NoVendor, Vendor},
    upstream::{NotAllowed, base_url},
};
use reqwest::{Proxy, redirect};
use rustls::{
    ClientConfig, RootCertStore,
    client::Resumption,
    crypto::ring,
    pki_types::{
        CertificateDer,
        pem::{self, PemObject},
    },
};

use crate::api::Api;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that is not used for so long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Why requests cannot go to a server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Provider(#[from] NoVendor),
    #[error("the base URL of {provider} is `{given}`")]
    BaseUrl {
        provider: Vendor,
        given: String,
        source: NotAllowed,
    },
    #[error("cannot read the certificates of the authorities for {provider}")]
    Authorities {
        provider: Vendor,
        source: pem::Error,
    },
    #[error("`{name}` is no header for {provider} that can be sent, or its value is not")]
    Header { provider: Vendor, name: String },
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    #[error("cannot set up connections")]
    Client(#[from] reqwest::Error),
}

/// The servers of one container: the providers' own, unless others take their place.
#[derive(Debug, Clone)]
pub struct Upstreams {
    own: Arc<ClientConfig>,
    others: BTreeMap<Vendor, Upstream>,
}

#[derive(Debug, Clone)]
struct Upstream {
    base_url: String,
    headers: HeaderMap,
    tls: Arc<ClientConfig>,
    proxy: Option<Proxy>,
}

impl Upstreams {
    /// The providers' own servers, with `roots` as the authorities that their certificates
    /// need.
    ///
    /// # Errors
    /// [`Error::Tls`]
    pub fn new(roots: RootCertStore) -> Result<Self, Error> {
        Ok(Self {
            own: tls(roots)?,
            others: BTreeMap::new(),
        })
    }

    /// The same, with other servers for some providers.
    ///
    /// # Errors
    /// [`Error`]
    pub(crate) fn with(&self, given: &[Given]) -> Result<Self, Error> {
        let mut all = self.clone();
        for given in given {
            let provider: Vendor = given.provider.parse()?;
            let upstream = Upstream::read(provider, given, &self.own)?;
            all.others.insert(provider, upstream);
        }
        Ok(all)
    }

    /// New connections to the server for an API.
    pub(crate) fn connect(&self, api: &Api) -> Result<Connections, Error> {
        let other = self.others.get(&api.provider);
        let (tls, proxy) = match other {
            Some(other) => (&other.tls, other.proxy.as_ref()),
            None => (&self.own, None),
        };
        Ok(Connections {
            base_url: other
                .map_or(api.base_url, |other| &other.base_url)
                .to_owned(),
            headers: other.map(|other| other.headers.clone()).unwrap_or_default(),
            requests: client(tls, proxy, &["h2", "http/1.1"])?,
            // HTTP/2 has another form of WebSockets, which the APIs do not offer.
            websockets: client(tls, proxy, &["http/1.1"])?,
        })
    }
}

impl Upstream {
    fn read(provider: Vendor, given: &Given, own: &Arc<ClientConfig>) -> Result<Self, Error> {
        let authorities = |source| Error::Authorities { provider, source };
        let tls = if given.ca.is_empty() {
            own.clone()
        } else {
            let mut roots = RootCertStore::empty();
            for certificate in CertificateDer::pem_slice_iter(&given.ca) {
                roots.add(certificate.map_err(authorities)?)?;
            }
            tls(roots)?
        };
        Ok(Self {
            base_url: base_url(&given.base_url).map_err(|source| Error::BaseUrl {
                provider,
                given: given.base_url.clone(),
                source,
            })?,
            headers: headers(provider, &given.headers)?,
            tls,
            proxy: match &*given.proxy {
                "" => None,
                proxy => Some(Proxy::https(proxy)?),
            },
        })
    }
}

fn headers(provider: Vendor, given: &BTreeMap<String, String>) -> Result<HeaderMap, Error> {
    let read = |(name, value): (&String, &String)| {
        let header = name.parse().ok().zip(value.parse().ok());
        header.ok_or_else(|| Error::Header {
            provider,
            name: name.clone(),
        })
    };
    given.iter().map(read).collect()
}

/// The connections of one run to one API.
pub(crate) struct Connections {
    pub(crate) base_url: String,
    /// Added to every request.
    pub(crate) headers: HeaderMap,
    pub(crate) requests: reqwest::Client,
    pub(crate) websockets: reqwest::Client,
}

fn tls(roots: RootCertStore) -> Result<Arc<ClientConfig>, Error> {
    let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(tls.into())
}

fn client(
    tls: &ClientConfig,
    proxy: Option<&Proxy>,
    protocols: &[&str],
) -> Result<reqwest::Client, Error> {
    let mut tls = tls.clone();
    // A session would outlive its run.
    tls.resumption = Resumption::disabled();
    tls.alpn_protocols = protocols.iter().map(|name| (*name).into()).collect();
    let mut client = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .redirect(redirect::Policy::none())
        .no_proxy()
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE_TIMEOUT);
    if let Some(proxy) = proxy {
        client = client.proxy(proxy.clone());
    }
    if !protocols.contains(&"h2") {
        client = client.http1_only();
    }
    Ok(client.build()?)
}
