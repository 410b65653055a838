//! The issuer's public keys: asked for at the start, every five minutes, and when a token names
//! one that is not there.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{Jwk, JwkSet, PublicKeyUse},
};
use reqwest::Client;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{
    sync::Mutex as Turn,
    time::{interval, sleep},
};
use url::{Host, Url};

use super::{Error, Refused};

/// Between two looks at keys that were had.
const LOOK: Duration = Duration::from_secs(5 * 60);
/// Between two tries otherwise.
const AGAIN: Duration = Duration::from_secs(5);
/// Keys are good for so long after they were had: those that the issuer has withdrawn are too.
const GOOD: Duration = Duration::from_secs(60 * 60);
/// For one answer.
const ANSWER: Duration = Duration::from_secs(5);
const BODY_MOST: usize = 1 << 20;
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
    had: Mutex<Had>,
    /// One at a time asks.
    turn: Turn<()>,
}

/// What was had last.
#[derive(Debug, Default)]
struct Had {
    keys: Option<(Arc<JwkSet>, Instant)>,
    tried: Option<Instant>,
    problem: Option<String>,
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
        let client = Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(ANSWER)
            .build()
            .map_err(Error::Client)?;
        Ok(Self {
            source,
            client,
            had: Mutex::default(),
            turn: Turn::default(),
        })
    }

    /// Asks for them again and again.
    pub(super) async fn keep(&self) {
        let mut looks = interval(LOOK);
        loop {
            looks.tick().await;
            while !self.ask().await {
                sleep(AGAIN.mul_f64(rand::random_range(0.8..1.2))).await;
            }
        }
    }

    /// The key of that name for that algorithm; without a name the only one there is for it.
    pub(super) async fn find(
        &self,
        kid: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<DecodingKey, Refused> {
        if let Some(key) = self.known(kid, algorithm)? {
            return Ok(key);
        }
        // Issuers make new ones. However many callers come with unknown names, it is asked at
        // most every few seconds.
        let _turn = self.turn.lock().await;
        if self.may_ask() {
            self.ask().await;
        }
        if let Some(key) = self.known(kid, algorithm)? {
            return Ok(key);
        }
        let had = self.had.lock().unwrap_or_else(PoisonError::into_inner);
        Err(match (&had.problem, kid) {
            (Some(reason), _) => Refused::NoKeys {
                reason: reason.clone(),
            },
            (None, kid) => Refused::UnknownKey {
                kid: kid.unwrap_or_default().chars().take(100).collect(),
            },
        })
    }

    fn known(
        &self,
        kid: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<Option<DecodingKey>, Refused> {
        let keys = {
            let had = self.had.lock().unwrap_or_else(PoisonError::into_inner);
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

    fn may_ask(&self) -> bool {
        let had = self.had.lock().unwrap_or_else(PoisonError::into_inner);
        had.tried.is_none_or(|tried| tried.elapsed() >= AGAIN)
    }

    /// Whether they were had.
    async fn ask(&self) -> bool {
        let asked = self.fetch().await;
        let now = Instant::now();
        let mut had = self.had.lock().unwrap_or_else(PoisonError::into_inner);
        had.tried = Some(now);
        match asked {
            Ok(keys) => {
                had.keys = Some((keys.into(), now));
                had.problem = None;
                true
            }
            Err(reason) => {
                tracing::warn!(reason, "the token issuer's keys are not to be had");
                had.problem = Some(reason);
                false
            }
        }
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
