//! Connections to the APIs. A container has its own, which are closed with its run: no two
//! users share a connection, and no buffer of one outlives the run.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use polydev_proto::provider::Provider;
use reqwest::redirect;
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use url::{Host, Url};

use crate::api::Api;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that is not used for so long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Where the requests for each provider go, and whom the broker trusts there.
#[derive(Debug, Clone)]
pub struct Upstreams {
    /// In place of the provider's own.
    base_urls: BTreeMap<Provider, String>,
    tls: Arc<ClientConfig>,
}

/// Why requests cannot go to an address.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "the base URL of {provider} is `{given}`; must be https://HOST[:PORT][/PATH], or http:// to a loopback address"
    )]
    BaseUrl { provider: Provider, given: String },
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    #[error("cannot set up connections")]
    Client(#[from] reqwest::Error),
}

impl Upstreams {
    /// The providers' own APIs, with `roots` as the authorities that their certificates need.
    ///
    /// # Errors
    /// [`Error::Tls`]
    pub fn new(roots: RootCertStore) -> Result<Self, Error> {
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            base_urls: BTreeMap::new(),
            tls: tls.into(),
        })
    }

    /// Sends the requests for a provider to another server.
    ///
    /// # Errors
    /// [`Error::BaseUrl`]
    pub fn replace(&mut self, provider: Provider, base_url: &str) -> Result<(), Error> {
        let url = Url::parse(base_url).ok().filter(is_allowed);
        let url = url.ok_or_else(|| Error::BaseUrl {
            provider,
            given: base_url.to_owned(),
        })?;
        let url = url.as_str().trim_end_matches('/').to_owned();
        self.base_urls.insert(provider, url);
        Ok(())
    }

    pub(crate) fn base_url(&self, api: &Api) -> &str {
        let replaced = self.base_urls.get(&api.provider);
        replaced.map_or(api.base_url, |url| url)
    }

    /// Connections for one container: for requests, and for WebSockets.
    pub(crate) fn connections(&self) -> Result<Connections, Error> {
        let client = |protocols: &[&str]| {
            let mut tls = (*self.tls).clone();
            tls.alpn_protocols = protocols.iter().map(|name| (*name).into()).collect();
            let client = reqwest::Client::builder()
                .tls_backend_preconfigured(tls)
                .redirect(redirect::Policy::none())
                .no_proxy()
                .connect_timeout(CONNECT_TIMEOUT)
                .pool_idle_timeout(IDLE_TIMEOUT);
            // HTTP/2 has another form of WebSockets, which the APIs do not offer.
            if protocols.contains(&"h2") {
                client
            } else {
                client.http1_only()
            }
            .build()
        };
        Ok(Connections {
            requests: client(&["h2", "http/1.1"])?,
            websockets: client(&["http/1.1"])?,
        })
    }
}

/// The connections of one container.
#[derive(Debug, Clone)]
pub(crate) struct Connections {
    pub(crate) requests: reqwest::Client,
    pub(crate) websockets: reqwest::Client,
}

/// A key goes to another machine by TLS only.
fn is_allowed(url: &Url) -> bool {
    let is_loopback = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => IpAddr::from(address).is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::from(address).is_loopback(),
        None => false,
    };
    let scheme_fits = url.scheme() == "https" || (url.scheme() == "http" && is_loopback);
    let is_bare = url.query().is_none() && url.fragment().is_none();
    scheme_fits && is_bare && url.username().is_empty() && url.password().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_by_tls_or_stay_on_the_machine() {
        let mut upstreams = Upstreams::new(RootCertStore::empty()).unwrap();
        let mut replace = |url| upstreams.replace(Provider::OpenAi, url);
        for good in [
            "https://gateway.example/openai",
            "https://gateway.example:8443",
            "http://127.0.0.1:4000/",
            "http://[::1]:4000",
            "http://localhost",
        ] {
            assert!(replace(good).is_ok(), "{good}");
        }
        for bad in [
            "http://gateway.example",
            "http://127.0.0.1.example",
            "http://10.0.0.1",
            "https://user:word@gateway.example",
            "https://gateway.example?x=1",
            "unix:///run/x.sock",
            "gateway.example",
            "",
        ] {
            let refused = replace(bad).unwrap_err().to_string();
            assert!(refused.contains(&format!("is `{bad}`")), "{refused}");
        }
        assert_eq!(
            upstreams.base_url(Api::of(Provider::OpenAi)),
            "http://localhost"
        );
        let anthropic = Api::of(Provider::Anthropic);
        assert_eq!(upstreams.base_url(anthropic), "https://api.anthropic.com");
    }
}
