//! Callers with a token. One issuer is the tests' own, which makes any token, valid or not. The
//! other one is Nomad itself, whose tasks have tokens.

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    process::Command,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use axum::{Json, Router, extract::State, routing::get};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use polydev_client::{Address, Client, Code, Identity, Status, Token, Trust, api};
use polydev_tests::{
    folder::Folder, free_ports, job, nomad::Nomad, process::succeed, program, shim::Shim,
    wait_until,
};
use ring::{
    hmac,
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tonic_types::StatusExt;

const AUDIENCE: &str = "polydev.test";

/// A key of an issuer.
struct Key {
    kid: String,
    pair: EcdsaKeyPair,
}

impl Key {
    fn new(kid: &str) -> Self {
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

    fn sign(&self, claims: &Value) -> String {
        self.sign_as(
            &json!({ "alg": "ES256", "typ": "JWT", "kid": self.kid }),
            claims,
        )
    }

    fn sign_as(&self, header: &Value, claims: &Value) -> String {
        let text = unsigned(header, claims);
        let signature = self.pair.sign(&SystemRandom::new(), text.as_bytes());
        let signature = signature.expect("a signature");
        format!("{text}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }
}

fn unsigned(header: &Value, claims: &Value) -> String {
    let text = |part: &Value| BASE64_URL_SAFE_NO_PAD.encode(part.to_string());
    format!("{}.{}", text(header), text(claims))
}

/// An issuer that serves its keys over HTTP.
struct Issuer {
    url: String,
    keys: Arc<Mutex<Vec<Value>>>,
    _runtime: Runtime,
}

impl Issuer {
    fn start() -> Self {
        let runtime = Runtime::new().expect("a runtime can be made");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
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
            _runtime: runtime,
        }
    }

    /// An issuer, and the key that it publishes.
    fn with_key() -> (Self, Key) {
        let (issuer, key) = (Self::start(), Key::new("first"));
        issuer.has(&[&key]);
        (issuer, key)
    }

    fn has(&self, keys: &[&Key]) {
        let keys = keys.iter().map(|key| key.public()).collect();
        *self.keys.lock().unwrap_or_else(PoisonError::into_inner) = keys;
    }

    fn claims(&self, subject: &str) -> Value {
        json!({
            "iss": self.url, "aud": [AUDIENCE, "another"], "sub": subject, "exp": now() + 600,
            "nbf": now(), "iat": now(),
        })
    }
}

fn now() -> u64 {
    let now = SystemTime::UNIX_EPOCH.elapsed();
    now.expect("a time after 1970").as_secs()
}

/// A shim's answer to a caller with this identity.
fn list(runtime: &Runtime, address: &str, identity: Identity) -> Result<(), Status> {
    let address: Address = address.parse().expect("a valid address");
    runtime.block_on(async {
        let client = Client::connect(&address, identity).await;
        let mut calls = client.expect("a connection").calls();
        calls.list_pools(api::ListPoolsRequest {}).await.map(drop)
    })
}

fn fixed(token: &str) -> Option<Token> {
    Some(Token::Fixed(Arc::new(token.to_owned().into())))
}

const ROLES: &str = r#"
    [[role]]
    members = ["sub:team-*"]
    may = ["run"]
    users = ["team-*"]

    [[role]]
    members = ["uid:0"]
    may = ["scale"]
"#;

/// A shim that takes the tokens of an issuer, with [`ROLES`]. It listens with a certificate at
/// `url` and without at `plain`.
struct Site {
    // Dropped before the folder with the shim's certificates.
    shim: Shim,
    runtime: Runtime,
    url: String,
    plain: String,
    authority: PathBuf,
    _folder: Folder,
}

impl Site {
    fn start(issuer: &Issuer, pools: &[&str]) -> Self {
        // Another test may have installed its provider.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let folder = Folder::new("pdtoken-");
        let path = |name: &str| folder.path().join(name);
        let text = |name: &str| path(name).display().to_string();
        succeed(
            Command::new(program("polydev-shim"))
                .args(["certs", "dev"])
                .arg(folder.path()),
        );
        fs::write(path("roles.toml"), ROLES).expect("a file can be written");
        let [port, plain] = free_ports();
        let url = format!("https://127.0.0.1:{port}");
        let plain = format!("http://127.0.0.1:{plain}");
        let (roles, authority) = (text("roles.toml"), path("ca.pem"));
        let (own, own_key, ca) = (text("shim.pem"), text("shim-key.pem"), text("ca.pem"));
        let options = [
            "--listen",
            &url,
            "--listen",
            &plain,
            "--roles",
            &roles,
            "--tls-cert",
            &own,
            "--tls-key",
            &own_key,
            "--tls-ca",
            &ca,
            "--token-issuer",
            &issuer.url,
            "--token-audience",
            AUDIENCE,
        ];
        let trace = [("POLYDEV_LOG", "trace")];
        Self {
            shim: Shim::dev_in(pools, &options, &trace),
            runtime: Runtime::new().expect("a runtime can be made"),
            url,
            plain,
            authority,
            _folder: folder,
        }
    }

    /// Lists the pools over HTTP: the status, and whether the answer asks for a token.
    fn get(&self, address: &str, authorization: &[&str]) -> (u16, bool) {
        let authority = fs::read(&self.authority).expect("an existing file");
        let authority = reqwest::Certificate::from_pem(&authority).expect("it is one");
        let client = reqwest::Client::builder().tls_certs_merge([authority]);
        let client = client.build().expect("it is of use");
        self.runtime.block_on(async {
            let mut request = client.get(format!("{address}/v1/pools"));
            for value in authorization {
                request = request.header("authorization", *value);
            }
            let answer = request.send().await.expect("the shim answers");
            let challenge = answer.headers().get("www-authenticate").is_some();
            (answer.status().as_u16(), challenge)
        })
    }

    /// Lists the pools over gRPC and TLS, with a token.
    fn list(&self, token: &str) -> Result<(), Status> {
        let identity = Identity {
            tls: Some(Trust::Server {
                authority: self.authority.clone(),
            }),
            token: fixed(token),
        };
        list(&self.runtime, &self.url, identity)
    }

    /// Lists the pools over gRPC without TLS.
    #[track_caller]
    fn refuses(&self, token: &str, words: &str) {
        let identity = Identity {
            tls: None,
            token: fixed(token),
        };
        let status = list(&self.runtime, &self.plain, identity);
        let status = status.expect_err("a refusal");
        let details = status.get_error_details();
        let info = details.error_info().expect("every error has it");
        assert_eq!(status.code(), Code::Unauthenticated, "{status}");
        assert_eq!(info.reason, "NOT_AUTHENTICATED");
        assert!(status.message().contains(words), "{status}, not {words}");
    }

    #[track_caller]
    fn has_not_logged(&self, token: &str) {
        let log = self.shim.process.log();
        let signature = token.rsplit('.').next();
        let signature = signature.expect("the last part is one");
        assert!(!log.contains(signature), "{log}");
    }
}

#[test]
fn a_token_is_taken_over_http_in_place_of_what_the_connection_says() {
    let (issuer, key) = Issuer::with_key();
    let site = Site::start(&issuer, &["anthropic=0"]);
    let token = key.sign(&issuer.claims("team-a"));
    let bearer = format!("bearer {token}");
    for address in [&site.url, &site.plain] {
        assert_eq!(site.get(address, &[&bearer]), (200, false));
    }
    assert_eq!(site.get(&site.url, &[]), (401, true));
    let of_connection = site.get(&site.plain, &[]);
    assert_eq!(of_connection, (403, false), "`loopback` has no role");
    for wrong in [["Basic YTpi"].as_slice(), &["Bearer"], &[&bearer, &bearer]] {
        assert_eq!(site.get(&site.plain, wrong), (401, true), "{wrong:?}");
    }
    site.has_not_logged(&token);
}

#[test]
fn a_token_with_wrong_claims_is_refused_with_the_reason() {
    let (issuer, key) = Issuer::with_key();
    let site = Site::start(&issuer, &["anthropic=0"]);
    let with = |name: &str, value: Value| {
        let mut claims = issuer.claims("team-a");
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
            value => claims[name] = value,
        }
        key.sign(&claims)
    };
    for (name, value, words) in [
        ("exp", json!(now() - 61), "expired"),
        ("exp", Value::Null, "`exp`"),
        ("exp", json!("tomorrow"), "`exp`"),
        ("nbf", json!(now() + 120), "not valid yet"),
        ("nbf", json!("yesterday"), "`nbf`"),
        ("aud", json!("another"), "audience"),
        ("aud", Value::Null, "`aud`"),
        ("iss", json!("https://issuer.test"), "issuer"),
        ("iss", Value::Null, "`iss`"),
        ("sub", Value::Null, "`sub`"),
        ("sub", json!(""), "`sub`"),
        ("sub", json!("team-a\n"), "`sub`"),
    ] {
        let token = with(name, value);
        site.refuses(&token, words);
        site.has_not_logged(&token);
    }
}

#[test]
fn a_token_that_its_issuer_has_not_signed_is_refused_with_the_reason() {
    let (issuer, key) = Issuer::with_key();
    let site = Site::start(&issuer, &["anthropic=0"]);
    let claims = issuer.claims("team-a");
    let token = key.sign(&claims);
    site.list(&token).unwrap();
    site.refuses(&Key::new("first").sign(&claims), "signature");
    site.refuses(&Key::new("second").sign(&claims), "no key \"second\"");
    let header = |algorithm: &str| json!({ "alg": algorithm, "kid": "first" });
    let open = format!("{}.", unsigned(&header("none"), &claims));
    site.refuses(&open, "not a JWT");
    let shared = hmac::Key::new(hmac::HMAC_SHA256, key.pair.public_key().as_ref());
    let message = unsigned(&header("HS256"), &claims);
    let signature = BASE64_URL_SAFE_NO_PAD.encode(hmac::sign(&shared, message.as_bytes()));
    site.refuses(&format!("{message}.{signature}"), "HS256");
    site.refuses(&key.sign_as(&header("RS256"), &claims), "no key");
    let critical = json!({ "alg": "ES256", "kid": "first", "crit": ["exp"] });
    site.refuses(&key.sign_as(&critical, &claims), "not a JWT");
    site.refuses(&token[..token.len() - 2], "");
    site.refuses("a.b.c", "not a JWT");
    site.refuses(&"a".repeat(13 << 10), "12288 bytes");
    site.has_not_logged(&token);
}

#[test]
fn an_issuers_new_keys_are_taken_and_its_last_ones_hold_while_it_is_away() {
    let (issuer, key) = Issuer::with_key();
    let site = Site::start(&issuer, &["anthropic=0"]);
    let token = key.sign(&issuer.claims("team-a"));
    site.list(&token).unwrap();
    let next = Key::new("next");
    issuer.has(&[&next]);
    let of_next = next.sign(&issuer.claims("team-b"));
    wait_until("the new key", Duration::from_secs(20), || {
        site.list(&of_next).map_err(|status| status.to_string())
    });
    site.refuses(&token, "no key \"first\"");
    drop(issuer);
    site.list(&of_next).unwrap();
    for token in [&token, &of_next] {
        site.has_not_logged(token);
    }
}

/// A task's own identity, which Nomad signs with RSA, lets it call the shim.
#[test]
fn a_nomad_task_calls_with_its_identity() {
    let nomad = Nomad::start();
    let mut task = job::batch(
        "caller",
        job::shell("cat ${NOMAD_SECRETS_DIR}/nomad_shim.jwt"),
    );
    job::task(&mut task)["Identities"] = json!([{ "Name": "shim", "Audience": [AUDIENCE], "File": true, "TTL": 3_600_000_000_000_i64 }]);
    nomad.submit(&task);
    nomad.wait_dead("caller");
    let alloc = nomad.allocations("caller")[0]["ID"]
        .as_str()
        .unwrap()
        .to_owned();
    let token = String::from_utf8(nomad.logs(&alloc, "stdout")).unwrap();

    let folder = Folder::new("pdtoken-");
    let roles = folder.path().join("roles.toml");
    let text = r#"
        [[role]]
        members = ["sub:global:default:caller:*:*:shim"]
        may = ["run"]

        [[role]]
        members = ["uid:0"]
        may = ["scale"]
    "#;
    fs::write(&roles, text).unwrap();
    let keys = format!("{}/.well-known/jwks.json", nomad.address);
    let options = [
        "--roles",
        &roles.display().to_string(),
        "--token-keys",
        &keys,
        "--token-audience",
        AUDIENCE,
    ];
    let shim = Shim::dev_with(&["anthropic=0"], &options);
    let runtime = Runtime::new().unwrap();
    let runs = |token| {
        let address: Address = shim.address.parse().unwrap();
        runtime.block_on(async {
            let identity = Identity { tls: None, token };
            let mut calls = Client::connect(&address, identity).await.unwrap().calls();
            calls
                .list_runs(api::ListRunsRequest::default())
                .await
                .map(drop)
        })
    };
    runs(fixed(token.trim())).unwrap();
    let of_connection = runs(None).unwrap_err();
    assert!(
        of_connection.message().contains("`uid:0`"),
        "{of_connection}"
    );
}
