//! The issuer's public keys. They are fetched at the start, every five minutes, and when a token
//! names an unknown key.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{Jwk, JwkSet, PublicKeyUse},
};
use polydev_transport::address::is_safe_url;
use reqwest::Client;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{
    sync::{Notify, Semaphore, watch},
    time::{sleep_until, timeout},
};

use super::{Error, Refused};
use crate::web;

/// The interval between two fetches.
const REFRESH_INTERVAL: Duration = Duration::from_secs(5 * 60);
/// The shortest interval between two fetches, and the interval after a failed one.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// How long fetched keys stay valid, including keys that the issuer has since revoked.
const MAX_AGE: Duration = Duration::from_secs(60 * 60);
/// The timeout of one request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BODY: usize = 1 << 20;
/// How many callers may wait for an unknown key.
const MAX_WAITING: usize = 256;
/// Below an issuer's URL (OpenID Connect Discovery 1.0, section 4).
const DISCOVERY: &str = "/.well-known/openid-configuration";

/// Where the keys are.
#[derive(Debug)]
enum Source {
    At(String),
    /// The issuer's configuration has the URL of the keys.
    Issuer(String),
}

#[derive(Debug)]
pub(super) struct Keys {
    source: Source,
    client: Client,
    had: watch::Sender<Had>,
    /// A caller waits for an unknown key.
    wanted: Notify,
    /// One permit per waiting caller.
    places: Semaphore,
}

/// The result of the last fetches.
#[derive(Debug, Default)]
struct Had {
    keys: Option<(Arc<JwkSet>, Instant)>,
    /// When the last fetch began, successful or not.
    asked: Option<Instant>,
}

#[derive(Deserialize)]
struct Configuration {
    issuer: String,
    jwks_uri: String,
}

/// # Errors
/// [`Error::Url`] if somebody on the network could replace the keys.
pub(super) fn check_url(option: &'static str, given: &str) -> Result<(), Error> {
    let refuse = || Error::Url {
        option,
        given: given.to_owned(),
    };
    is_safe_url(given).then_some(()).ok_or_else(refuse)
}

impl Keys {
    pub(super) fn at(url: String) -> Result<Self, Error> {
        Self::new(Source::At(url))
    }

    pub(super) fn of_issuer(url: String) -> Result<Self, Error> {
        Self::new(Source::Issuer(url))
    }

    fn new(source: Source) -> Result<Self, Error> {
        let client = web::client(ANSWER_TIMEOUT).map_err(Error::Client)?;
        Ok(Self {
            source,
            client,
            had: watch::Sender::default(),
            wanted: Notify::new(),
            places: Semaphore::new(MAX_WAITING),
        })
    }

    /// Fetches the keys again and again. Nothing else fetches them, so that callers cannot cause
    /// more fetches.
    pub(super) async fn keep(&self) {
        loop {
            let asked = Instant::now();
            let keys = self.fetch().await;
            let again = match &keys {
                Ok(_) => REFRESH_INTERVAL,
                Err(reason) => {
                    tracing::warn!(reason, "cannot fetch the token issuer's keys");
                    RETRY_INTERVAL
                }
            };
            self.had.send_modify(|had| {
                had.asked = Some(asked);
                if let Ok(keys) = keys {
                    had.keys = Some((keys.into(), asked));
                }
            });
            let pause = RETRY_INTERVAL.mul_f64(rand::random_range(0.8..1.0));
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

    /// The key with this id for this algorithm; without an id, the only key for the algorithm.
    /// Issuers make new keys: if a key is unknown, this call waits until the keys have been fetched
    /// once more.
    ///
    /// # Cancel safety
    /// A cancelled call loses nothing.
    pub(super) async fn find(
        &self,
        kid: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<DecodingKey, Refused> {
        if let Some(key) = self.known(kid, algorithm)? {
            return Ok(key);
        }
        let _place = self.places.try_acquire().map_err(|_| Refused::NoKeys)?;
        let come = timeout(
            RETRY_INTERVAL + 2 * ANSWER_TIMEOUT,
            self.come(kid, algorithm),
        )
        .await;
        come.unwrap_or(Err(Refused::NoKeys))
    }

    /// Waits until the key is there, or until a fetch shows that the issuer does not have it.
    async fn come(&self, kid: Option<&str>, algorithm: Algorithm) -> Result<DecodingKey, Refused> {
        let (came, mut had) = (Instant::now(), self.had.subscribe());
        self.wanted.notify_one();
        loop {
            // This cannot fail: the sender is in `self`.
            let _changed = had.changed().await;
            if let Some(key) = self.known(kid, algorithm)? {
                return Ok(key);
            }
            let had = had.borrow_and_update();
            if had.asked.is_some_and(|asked| asked >= came) {
                // A fetch since the call began has succeeded, or has failed.
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
            let good = had.keys.as_ref().filter(|(_, at)| at.elapsed() < MAX_AGE);
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
                    let words = format!("`issuer` in {url} is `{}`", configuration.issuer);
                    return Err(words);
                }
                if !is_safe_url(&configuration.jwks_uri) {
                    return Err(format!(
                        "`jwks_uri` in {url} is `{}`: allowed are https URLs, and http URLs of \
                         the loopback address",
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
            if body.len() + chunk.len() > MAX_BODY {
                return Err(told(format!("the answer is longer than {MAX_BODY} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        serde_json::from_slice(&body).map_err(|error| told(error.to_string()))
    }
}

/// Whether the key is for signatures with this algorithm, as the issuer declares it.
fn is_for(key: &Jwk, algorithm: Algorithm) -> bool {
    let named = key.common.key_algorithm.map(|named| named.to_string());
    let is_named = named.is_none_or(|named| named == format!("{algorithm:?}"));
    let is_to_sign = !matches!(key.common.public_key_use, Some(PublicKeyUse::Encryption));
    let is_of_family =
        DecodingKey::from_jwk(key).is_ok_and(|key| key.family().algorithms().contains(&algorithm));
    is_named && is_to_sign && is_of_family
}
