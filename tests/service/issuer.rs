//! An issuer of tokens that makes any token, valid or not.

use std::{
    net::TcpListener,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use axum::{Json, Router, extract::State, routing::get};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

/// The audience of the issuer's tokens.
pub(crate) const AUDIENCE: &str = "polydev.test";

/// A key of an issuer.
pub(crate) struct Key {
    kid: String,
    pub(crate) pair: EcdsaKeyPair,
}

impl Key {
    pub(crate) fn new(kid: &str) -> Self {
        let (algorithm, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let made = EcdsaKeyPair::generate_pkcs8(algorithm, &random).expect("a key can be made");
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, made.as_ref(), &random);
        Self {
            kid: kid.into(),
            pair: pair.expect("it is one"),
        }
    }

    /// The public key as its issuer publishes it.
    fn public(&self) -> Value {
        let (x, y) = self.pair.public_key().as_ref()[1..].split_at(32);
        let text = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
        json!({
            "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": self.kid,
            "x": text(x), "y": text(y),
        })
    }

    pub(crate) fn sign(&self, claims: &Value) -> String {
        let header = json!({ "alg": "ES256", "typ": "JWT", "kid": self.kid });
        self.sign_as(&header, claims)
    }

    pub(crate) fn sign_as(&self, header: &Value, claims: &Value) -> String {
        let text = unsigned(header, claims);
        let signature = self.pair.sign(&SystemRandom::new(), text.as_bytes());
        let signature = signature.expect("a signature");
        format!("{text}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }
}

/// The part of a token that is signed.
pub(crate) fn unsigned(header: &Value, claims: &Value) -> String {
    let text = |part: &Value| BASE64_URL_SAFE_NO_PAD.encode(part.to_string());
    format!("{}.{}", text(header), text(claims))
}

/// An issuer that serves its keys over HTTP.
pub(crate) struct Issuer {
    pub(crate) url: String,
    keys: Arc<Mutex<Vec<Value>>>,
    /// `None` once the issuer has left.
    runtime: Option<Runtime>,
}

impl Issuer {
    pub(crate) fn start() -> Self {
        let runtime = Runtime::new().expect("a runtime can be made");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let url = format!("http://{}", listener.local_addr().expect("a bound socket"));
        let keys = Arc::new(Mutex::new(Vec::new()));
        let configuration = json!({ "issuer": url, "jwks_uri": format!("{url}/keys") });
        let router = Router::new()
            .route(
                "/.well-known/openid-configuration",
                get(async move || Json(configuration)),
            )
            .route(
                "/keys",
                get(async |State(keys): State<Arc<Mutex<Vec<Value>>>>| {
                    let keys = keys.lock().unwrap_or_else(PoisonError::into_inner);
                    Json(json!({ "keys": *keys }))
                }),
            )
            .with_state(keys.clone());
        runtime.spawn(async move {
            listener.set_nonblocking(true).expect("it can be set");
            let listener = tokio::net::TcpListener::from_std(listener);
            axum::serve(listener.expect("a listener"), router).await
        });
        Self {
            url,
            keys,
            runtime: Some(runtime),
        }
    }

    /// Publishes these keys instead of the previous ones.
    pub(crate) fn has(&self, keys: &[&Key]) {
        let keys = keys.iter().map(|key| key.public()).collect();
        *self.keys.lock().unwrap_or_else(PoisonError::into_inner) = keys;
    }

    /// Stops serving.
    pub(crate) fn leave(&mut self) {
        drop(self.runtime.take());
    }

    /// The claims of a token for a subject.
    pub(crate) fn claims(&self, subject: &str) -> Value {
        json!({
            "iss": self.url, "aud": [AUDIENCE, "another"], "sub": subject, "exp": now() + 600,
            "nbf": now(), "iat": now(),
        })
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    let now = SystemTime::UNIX_EPOCH.elapsed();
    now.expect("a time after 1970").as_secs()
}
