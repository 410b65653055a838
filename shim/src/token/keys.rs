//! The issuer's public keys: asked for at the start, every five minutes, and when a token names
//! one that is not there.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{Jwk, JwkSet, PublicKeyUse},
};
use reqwest::{Client, NoProxy, Proxy};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{
    sync::{Notify, Semaphore, watch},
    time::{sleep_until, timeout},
};
use url::{Host, Url};

use super::{Error, Refused};

/// Between two times that it is asked.
const LOOK: Duration = Duration::from_secs(5 * 60);
/// Between two at least.
const AGAIN: Duration = Duration::from_secs(5);
/// Keys are good for so long after they were had: those that the issuer has withdrawn are too.
const GOOD: Duration = Duration::from_secs(60 * 60);
/// For one answer.
const ANSWER: Duration = Duration::from_secs(5);
const BODY_MOST: usize = 1 << 20;
/// Callers who may wait for a key that is not there.
const WAITING_MOST: usize = 256;
/// Below an issuer's URL (OpenID Connect Discovery 1.0, section 4).
const DISCOVERY: &str = "/.well-known/openid-configuration";

/// Where they are.
#[derive(Debug)]
enum Source {
    At(String),
    /// Its configuration says where.
    Issuer(String),
}

#[derive(Debug)]
pub(super) struct Keys {
    source: Source,
    client: Client,
    had: watch::Sender<Had>,
    /// Somebody waits for others than there are.
    wanted: Notify,
    /// For those who wait.
    places: Semaphore,
}

/// What was had last.
#[derive(Debug, Default)]
struct Had {
    keys: Option<(Arc<JwkSet>, Instant)>,
    /// When it was asked for last, to whatever end.
    asked: Option<Instant>,
}

#[derive(Deserialize)]
struct Configuration {
    issuer: String,
    jwks_uri: String,
}

/// # Errors
/// [`Error::Url`] unless nobody on the way can put keys of his own there.
pub(super) fn check_url(option: &'static str, given: &str) -> Result<(), Error> {
    let refuse = || Error::Url {
        option,
        given: given.to_owned(),
    };
    is_safe(given).then_some(()).ok_or_else(refuse)
}

fn is_safe(given: &str) -> bool {
    let Ok(url) = Url::parse(given) else {
        return false;
    };
    let is_loopback = match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    };
    match url.scheme() {
        "https" => url.host().is_some(),
        "http" => is_loopback,
        _ => false,
    }
}

impl Keys {
    pub(super) fn at(url: String) -> Result<Self, Error> {
        Self::new(Source::At(url))
    }

    pub(super) fn of_issuer(url: String) -> Result<Self, Error> {
        Self::new(Source::Issuer(url))
    }

    fn new(source: Source) -> Result<Self, Error> {
        // A second call, as in tests, finds it done.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        // Whoever answers in the clear on the way would be the issuer.
        let mut client = Client::builder().no_proxy();
        let of_environment = ["HTTPS_PROXY", "https_proxy"].map(std::env::var);
        if let Some(proxy) = of_environment.into_iter().find_map(Result::ok) {
            let proxy = Proxy::https(proxy).map_err(Error::Client)?;
            client = client.proxy(proxy.no_proxy(NoProxy::from_env()));
        }
        let client = client
            .redirect(reqwest::redirect::Policy::none())
            .timeout(ANSWER)
            .build()
            .map_err(Error::Client)?;
        Ok(Self {
            source,
            client,
            had: watch::Sender::default(),
            wanted: Notify::new(),
            places: Semaphore::new(WAITING_MOST),
        })
    }

    /// Asks for them again and again; nobody else does, so that no caller can have it asked
    /// more often.
    pub(super) async fn keep(&self) {
        loop {
            let asked = Instant::now();
            let keys = self.fetch().await;
            let again = match &keys {
                Ok(_) => LOOK,
                Err(reason) => {
                    tracing::warn!(reason, "the token issuer's keys are not to be had");
                    AGAIN
                }
            };
            self.had.send_modify(|had| {
                had.asked = Some(asked);
                if let Ok(keys) = keys {
                    had.keys = Some((keys.into(), asked));
                }
            });
            let pause = AGAIN.mul_f64(rand::random_range(0.8..1.0));
            let wanted = async {
                sleep_until((asked + pause).into()).await;
                self.wanted.notified().await;
            };
            tokio::select! {
                () = sleep_until((asked + again).into()) => {}
                () = wanted => {}
            }
        }
    }

    /// The key of that name for that algorithm; without a name the only one there is for it.
    /// Issuers make new ones: one that is not there is waited for, until the issuer has been asked
    /// once more.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub(super) async fn find(
        &self,
        kid: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<DecodingKey, Refused> {
        if let Some(key) = self.known(kid, algorithm)? {
            return Ok(key);
        }
        let _place = self.places.try_acquire().map_err(|_| Refused::NoKeys)?;
        let come = timeout(AGAIN + 2 * ANSWER, self.come(kid, algorithm)).await;
        come.unwrap_or(Err(Refused::NoKeys))
    }

    /// As soon as it is there; or refuses it once the issuer has been asked.
    async fn come(&self, kid: Option<&str>, algorithm: Algorithm) -> Result<DecodingKey, Refused> {
        let (came, mut had) = (Instant::now(), self.had.subscribe());
        self.wanted.notify_one();
        loop {
            // Its sender is in `self`.
            let _changed = had.changed().await;
            if let Some(key) = self.known(kid, algorithm)? {
                return Ok(key);
            }
            let had = had.borrow_and_update();
            if had.asked.is_some_and(|asked| asked >= came) {
                // Whether there is such a key was found out, or was to be.
                let is_had = had.keys.as_ref().is_some_and(|(_, at)| *at >= came);
                let kid = kid.unwrap_or_default().chars().take(100).collect();
                return Err(match is_had {
                    true => Refused::UnknownKey { kid },
                    false => Refused::NoKeys,
                });
            }
        }
    }

    fn known(
        &self,
        kid: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<Option<DecodingKey>, Refused> {
        let keys = {
            let had = self.had.borrow();
            let good = had.keys.as_ref().filter(|(_, at)| at.elapsed() < GOOD);
            good.map(|(keys, _)| keys.clone())
        };
        let fits = |key: &&Jwk| {
            let is_it = kid.is_none_or(|kid| key.common.key_id.as_deref() == Some(kid));
            is_it && is_for(key, algorithm)
        };
        let mut fitting = keys.iter().flat_map(|keys| &keys.keys).filter(fits);
        let Some(key) = fitting.next() else {
            return Ok(None);
        };
        if kid.is_none() && fitting.next().is_some() {
            return Err(Refused::NoKeyNamed);
        }
        let key = DecodingKey::from_jwk(key).map_err(|_| Refused::Malformed)?;
        Ok(Some(key))
    }

    async fn fetch(&self) -> Result<JwkSet, String> {
        let url = match &self.source {
            Source::At(url) => url.clone(),
            Source::Issuer(issuer) => {
                let url = format!("{}{DISCOVERY}", issuer.trim_end_matches('/'));
                let configuration: Configuration = self.get(&url).await?;
                if configuration.issuer != *issuer {
                    let words = format!("{url} is the configuration of `{}`", configuration.issuer);
                    return Err(words);
                }
                if !is_safe(&configuration.jwks_uri) {
                    return Err(format!(
                        "{url} has its keys at `{}`",
                        configuration.jwks_uri
                    ));
                }
                configuration.jwks_uri
            }
        };
        self.get(&url).await
    }

    async fn get<T: DeserializeOwned>(&self, url: &str) -> Result<T, String> {
        let reach = |error: reqwest::Error| crate::chain(&error.without_url());
        let told = |problem: String| format!("{url}: {problem}");
        let mut response = self
            .client
            .get(url)
            .send()
            .await
            .map_err(reach)
            .map_err(told)?;
        if !response.status().is_success() {
            return Err(told(response.status().to_string()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(reach).map_err(told)? {
            if body.len() + chunk.len() > BODY_MOST {
                return Err(told(format!("more than {BODY_MOST} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        serde_json::from_slice(&body).map_err(|error| told(error.to_string()))
    }
}

/// Whether a key may check a signature of that algorithm, by what its issuer says of it.
fn is_for(key: &Jwk, algorithm: Algorithm) -> bool {
    let named = key.common.key_algorithm.map(|named| named.to_string());
    let is_named = named.is_none_or(|named| named == format!("{algorithm:?}"));
    let is_to_sign = !matches!(key.common.public_key_use, Some(PublicKeyUse::Encryption));
    let is_of_family =
        DecodingKey::from_jwk(key).is_ok_and(|key| key.family().algorithms().contains(&algorithm));
    is_named && is_to_sign && is_of_family
}
