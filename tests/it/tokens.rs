//! Callers known by a token: an issuer of the tests' own, of which anything can be had, and Nomad
//! itself, whose tasks have tokens.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Command, Output},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use axum::{Json, Router, extract::State, routing::get};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use polydev_client::{Address, Client, Code, Identity, Status, Token, Trust, api};
use polydev_tests::{
    folder::Folder,
    free_ports, job,
    nomad::Nomad,
    process::{output, succeed},
    program,
    shim::Shim,
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

/// One key of an issuer's.
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

    /// As its issuer tells it.
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
        let signature = signature.expect("it signs");
        format!("{text}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }
}

fn unsigned(header: &Value, claims: &Value) -> String {
    let text = |part: &Value| BASE64_URL_SAFE_NO_PAD.encode(part.to_string());
    format!("{}.{}", text(header), text(claims))
}

/// An issuer that can be asked for its keys.
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
            axum::serve(listener.expect("it listens"), router).await
        });
        Self {
            url,
            keys,
            _runtime: runtime,
        }
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
    now.expect("it is later").as_secs()
}

/// What a shim says to a caller who shows that.
fn list(runtime: &Runtime, address: &str, identity: Identity) -> Result<(), Status> {
    let address: Address = address.parse().expect("it is an address");
    runtime.block_on(async {
        let client = Client::connect(&address, identity).await;
        let mut calls = client.expect("it connects").calls();
        calls.list_pools(api::ListPoolsRequest {}).await.map(drop)
    })
}

fn fixed(token: &str) -> Option<Token> {
    Some(Token::Fixed(Arc::new(token.to_owned().into())))
}

fn run(address: &str, authority: &Path, token: &Path, user: &str) -> Output {
    let mut command = Command::new(program("polydev-shim"));
    command.args(["run", "anthropic", "--address", address, "--user", user]);
    command
        .arg("--tls-ca")
        .arg(authority)
        .arg("--token-file")
        .arg(token);
    output(command.args(["--", "sh", "-c", "echo $USER_ID"]))
}

#[test]
fn callers_are_known_by_the_tokens_of_an_issuer_and_by_no_others() {
    // One of another test may be installed.
    let _installed = rustls::crypto::ring::default_provider().install_default();
    let folder = Folder::new("pdtoken-");
    let path = |name: &str| folder.path().join(name);
    let text = |name: &str| path(name).display().to_string();
    succeed(
        Command::new(program("polydev-shim"))
            .args(["certs", "dev"])
            .arg(folder.path()),
    );
    let roles = r#"
        [[role]]
        members = ["sub:team-*"]
        may = ["run"]
        users = ["team-*"]

        [[role]]
        members = ["uid:0"]
        may = ["scale"]
    "#;
    fs::write(path("roles.toml"), roles).unwrap();
    let (issuer, key) = (Issuer::start(), Key::new("first"));
    issuer.has(&[&key]);
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
    let shim = Shim::dev_in(&["anthropic=1"], &options, &trace);
    let runtime = Runtime::new().unwrap();

    let token = key.sign(&issuer.claims("team-a"));
    fs::write(path("token"), format!("{token}\n")).unwrap();
    let allowed = run(&url, &authority, &path("token"), "team-a");
    assert_eq!(allowed.stdout, b"team-a\n", "{allowed:?}");
    let denied = run(&url, &authority, &path("token"), "alice");
    let words = String::from_utf8_lossy(&denied.stderr).into_owned();
    assert!(words.contains("caller `sub:team-a` has no role"), "{words}");

    // Over HTTP as well, and in place of whatever else the connection says.
    let get = |address: &str, authorization: &[&str]| {
        runtime.block_on(async {
            let client = reqwest::Client::builder()
                .tls_certs_merge([
                    reqwest::Certificate::from_pem(&fs::read(&authority).unwrap()).unwrap(),
                ])
                .build()
                .unwrap();
            let mut request = client.get(format!("{address}/v1/pools"));
            for value in authorization {
                request = request.header("authorization", *value);
            }
            let answer = request.send().await.unwrap();
            let challenge = answer.headers().get("www-authenticate").is_some();
            (answer.status().as_u16(), challenge)
        })
    };
    let bearer = format!("bearer {token}");
    for address in [&url, &plain] {
        assert_eq!(get(address, &[&bearer]), (200, false));
    }
    assert_eq!(get(&url, &[]), (401, true));
    assert_eq!(get(&plain, &[]), (403, false), "`loopback` has no role");
    for wrong in [["Basic YTpi"].as_slice(), &["Bearer"], &[&bearer, &bearer]] {
        assert_eq!(get(&plain, wrong), (401, true), "{wrong:?}");
    }

    let refused = |token: &str, words: &str| {
        let identity = Identity {
            tls: None,
            token: fixed(token),
        };
        let status = list(&runtime, &plain, identity).unwrap_err();
        let details = status.get_error_details();
        assert_eq!(status.code(), Code::Unauthenticated, "{status}");
        assert_eq!(details.error_info().unwrap().reason, "NOT_AUTHENTICATED");
        assert!(status.message().contains(words), "{status}, not {words}");
    };
    let with = |name: &str, value: Value| {
        let mut claims = issuer.claims("team-a");
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
            value => claims[name] = value,
        }
        key.sign(&claims)
    };
    refused(&with("exp", json!(now() - 61)), "expired");
    refused(&with("exp", Value::Null), "`exp`");
    refused(&with("exp", json!("tomorrow")), "`exp`");
    refused(&with("nbf", json!(now() + 120)), "does not hold yet");
    refused(&with("nbf", json!("yesterday")), "`nbf`");
    refused(&with("aud", json!("another")), "audience");
    refused(&with("aud", Value::Null), "`aud`");
    refused(&with("iss", json!("https://issuer.test")), "issuer");
    refused(&with("iss", Value::Null), "`iss`");
    refused(&with("sub", Value::Null), "`sub`");
    refused(&with("sub", json!("")), "`sub`");
    refused(&with("sub", json!("team-a\n")), "`sub`");
    let claims = issuer.claims("team-a");
    refused(&Key::new("first").sign(&claims), "signature");
    refused(&Key::new("second").sign(&claims), "no key \"second\"");
    let header = |algorithm: &str| json!({ "alg": algorithm, "kid": "first" });
    refused(
        &format!("{}.", unsigned(&header("none"), &claims)),
        "not a JWT",
    );
    let shared = hmac::Key::new(hmac::HMAC_SHA256, key.pair.public_key().as_ref());
    let message = unsigned(&header("HS256"), &claims);
    let signature = BASE64_URL_SAFE_NO_PAD.encode(hmac::sign(&shared, message.as_bytes()));
    refused(&format!("{message}.{signature}"), "HS256");
    refused(&key.sign_as(&header("RS256"), &claims), "no key");
    let critical = json!({ "alg": "ES256", "kid": "first", "crit": ["exp"] });
    refused(&key.sign_as(&critical, &claims), "not a JWT");
    refused(&token[..token.len() - 2], "");
    refused("a.b.c", "not a JWT");
    refused(&"a".repeat(13 << 10), "12288 bytes");

    // The issuer has another key, and then is gone: what it had holds on.
    let next = Key::new("next");
    issuer.has(&[&next]);
    let of_next = next.sign(&issuer.claims("team-b"));
    let shown = |token: &str| {
        let identity = Identity {
            tls: Some(Trust::Server {
                authority: authority.clone(),
            }),
            token: fixed(token),
        };
        list(&runtime, &url, identity)
    };
    wait_until("the new key", Duration::from_secs(20), || {
        shown(&of_next).map_err(|status| status.to_string())
    });
    refused(&token, "no key \"first\"");
    drop(issuer);
    shown(&of_next).unwrap();

    let log = shim.process.log();
    assert!(log.contains("caller=sub:team-a"), "{log}");
    for secret in [&token, &of_next] {
        let signature = secret.rsplit('.').next().unwrap();
        assert!(!log.contains(signature), "{log}");
    }
}

#[test]
fn settings_for_tokens_that_make_no_sense_are_refused() {
    let refused = |options: &[&str], words: &str| {
        let mut command = Command::new(program("polydev-shim"));
        let refused = output(command.args(["config", "check"]).args(options));
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && told.contains(words), "{told}");
    };
    let audience = ["--token-audience", "a"];
    refused(&audience, "--token-issuer or --token-keys");
    refused(
        &["--token-issuer", "https://issuer.test"],
        "--token-audience",
    );
    for url in ["http://issuer.test", "issuer.test", "file:///keys"] {
        for option in ["--token-issuer", "--token-keys"] {
            refused(
                &[&[option, url], &audience[..]].concat(),
                "allowed are https URLs",
            );
        }
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
        members = ["sub:global:default:caller:*"]
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
