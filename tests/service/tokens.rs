//! Callers known by the tokens of an issuer.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
    sync::Arc,
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use polydev_client::{Address, Client, Code, Identity, Status, Token, Trust, api};
use polydev_tests::{process::output, program, wait_until};
use ring::{hmac, signature::KeyPair};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::{
    certificates::{Tls, words},
    issuer::{AUDIENCE, Issuer, Key, now, unsigned},
    site::{LIMIT, Site, myself, port, reason},
};

/// A shim that accepts the tokens of an issuer, over TLS and over the loopback address.
struct Known {
    site: Site,
    issuer: Issuer,
    key: Key,
    tls: Tls,
    plain: String,
    runtime: Runtime,
}

impl Known {
    fn start() -> Self {
        // Another test may have installed its provider.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let myself = myself();
        let tls = Tls::with_roles(&format!(
            r#"
            [[role]]
            members = ["sub:team-*"]
            may = ["run"]
            users = ["team-*"]

            [[role]]
            members = ["sub:own:*"]
            may = ["run"]
            users = ["{{caller}}"]

            [[role]]
            members = ["{myself}"]
            may = ["scale"]
            "#
        ));
        let (issuer, key) = (Issuer::start(), Key::new("first"));
        issuer.has(&[&key]);
        let plain = format!("http://127.0.0.1:{}", port());
        let mut options = tls.options();
        for (name, value) in [
            ("--listen", plain.as_str()),
            ("--token-issuer", issuer.url.as_str()),
            ("--token-audience", AUDIENCE),
            ("--token-user", "email"),
        ] {
            options.extend([name.to_owned(), value.to_owned()]);
        }
        let trace = [("POLYDEV_LOG", "trace")];
        Self {
            site: Site::start_in(&[("anthropic", 1)], &words(&options), &trace),
            issuer,
            key,
            tls,
            plain,
            runtime: Runtime::new().expect("a runtime can be made"),
        }
    }

    fn token(&self) -> String {
        self.key.sign(&self.issuer.claims("team-a"))
    }

    fn authority(&self) -> PathBuf {
        self.tls.ours().join("ca.pem")
    }

    /// The shim's answer to a caller with this identity.
    fn list(&self, address: &str, identity: Identity) -> Result<(), Status> {
        let address: Address = address.parse().expect("a valid address");
        self.runtime.block_on(async {
            let client = Client::connect(&address, identity).await;
            let mut calls = client.expect("a connection").calls();
            calls.list_pools(api::ListPoolsRequest {}).await.map(drop)
        })
    }

    /// The shim's answer to a token over TLS.
    fn shown(&self, token: &str) -> Result<(), Status> {
        let identity = Identity {
            tls: Some(Trust::Server {
                authority: self.authority(),
            }),
            token: fixed(token),
        };
        self.list(&self.tls.url, identity)
    }

    /// Asserts that the shim refuses a token with a reason that contains these words.
    #[track_caller]
    fn refuses(&self, token: &str, words: &str) {
        let identity = Identity {
            tls: None,
            token: fixed(token),
        };
        let status = self.list(&self.plain, identity);
        let status = status.expect_err("a refusal");
        assert_eq!(status.code(), Code::Unauthenticated, "{status}");
        assert_eq!(reason(&status), "NOT_AUTHENTICATED");
        assert!(status.message().contains(words), "{status}, not {words}");
    }

    /// Runs `polydev-shim run anthropic --user USER` with this token in a file.
    fn run(&self, token: &str, user: &str) -> Output {
        let file = self.tls.ours().join("token");
        fs::write(&file, format!("{token}\n")).expect("a file can be written");
        let mut command = Command::new(program("polydev-shim"));
        command.args(["run", "anthropic", "--address", &self.tls.url]);
        command.args(["--user", user]);
        command.arg("--tls-ca").arg(self.authority());
        command.arg("--token-file").arg(file);
        output(command.args(["--", "out:done"]))
    }

    /// Its signature is not in the log, though everything is logged.
    #[track_caller]
    fn has_not_logged(&self, token: &str) {
        let log = self.site.shim.process.log();
        let signature = token.rsplit('.').next().expect("the last part is one");
        assert!(!log.contains(signature), "{log}");
    }

    /// The status of a call over HTTP, and whether it says how to authenticate.
    fn get(&self, address: &str, authorization: &[&str]) -> (u16, bool) {
        self.runtime.block_on(async {
            let authority = fs::read(self.authority()).expect("an existing file");
            let authority = reqwest::Certificate::from_pem(&authority);
            let client = reqwest::Client::builder()
                .no_proxy()
                .tls_certs_merge([authority.expect("a certificate")])
                .build()
                .expect("a client can be made");
            let mut request = client.get(format!("{address}/v1/pools"));
            for value in authorization {
                request = request.header("authorization", *value);
            }
            let answer = request.send().await.expect("an answer");
            let challenge = answer.headers().get("www-authenticate").is_some();
            (answer.status().as_u16(), challenge)
        })
    }
}

fn fixed(token: &str) -> Option<Token> {
    Some(Token::Fixed(Arc::new(token.to_owned().into())))
}

#[test]
fn a_caller_is_the_subject_of_its_token() {
    let known = Known::start();
    let token = known.token();
    let allowed = known.run(&token, "team-a");
    assert_eq!(allowed.stdout, b"done", "{allowed:?}");
    let claim = known.site.node().asked().claims.remove(0);
    assert_eq!(claim.user_id, "team-a");
    assert_eq!(claim.spec.unwrap().env["USER_ID"], "team-a");
    let denied = known.run(&token, "alice");
    let words = String::from_utf8_lossy(&denied.stderr).into_owned();
    assert!(words.contains("caller `sub:team-a` has no role"), "{words}");
    assert_eq!(known.site.node().asked().claims.len(), 1);
    let log = known.site.shim.process.log();
    assert!(log.contains(r#""caller":"sub:team-a""#), "{log}");
    known.has_not_logged(&token);
}

#[test]
fn a_role_can_be_for_the_user_that_the_issuer_names() {
    let known = Known::start();
    let token = |sub: &str, email: Value| {
        let mut claims = known.issuer.claims(sub);
        claims["email"] = email;
        known.key.sign(&claims)
    };
    let alice = token("own:1", json!("alice@example.org"));
    let own = known.run(&alice, "alice@example.org");
    assert_eq!(own.stdout, b"done", "{own:?}");
    for (token, user) in [
        (&alice, "bob@example.org"),
        (&alice, "own:1"),
        (
            &token("own:2", json!("bob@example.org")),
            "alice@example.org",
        ),
        (&token("own:3", Value::Null), "alice@example.org"),
        (
            &token("own:3", json!(["alice@example.org"])),
            "alice@example.org",
        ),
        // Its subject looks like one of the role's members, with a part more.
        (
            &token("own:1:2", json!("alice@example.org")),
            "alice@example.org",
        ),
    ] {
        let denied = known.run(token, user);
        let words = String::from_utf8_lossy(&denied.stderr).into_owned();
        assert!(words.contains("has no role"), "{user}: {words}");
    }
    assert_eq!(known.site.node().asked().claims.len(), 1);
}

/// A token is valid over HTTP too. It overrides any other identity of the connection.
#[test]
fn a_token_counts_over_http_and_nothing_else_does_beside_it() {
    let known = Known::start();
    let bearer = format!("bearer {}", known.token());
    for address in [&known.tls.url, &known.plain] {
        assert_eq!(known.get(address, &[&bearer]), (200, false));
    }
    assert_eq!(known.get(&known.tls.url, &[]), (401, true));
    let of_connection = known.get(&known.plain, &[]);
    assert_eq!(of_connection, (403, false), "`loopback` has no role");
    for wrong in [["Basic YTpi"].as_slice(), &["Bearer"], &[&bearer, &bearer]] {
        assert_eq!(known.get(&known.plain, wrong), (401, true), "{wrong:?}");
    }
}

#[test]
fn claims_that_are_wrong_are_refused_by_name() {
    let known = Known::start();
    let with = |name: &str, value: Value| {
        let mut claims = known.issuer.claims("team-a");
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
            value => claims[name] = value,
        }
        known.key.sign(&claims)
    };
    for (name, value, words) in [
        ("exp", json!(now() - 61), "expired"),
        ("exp", Value::Null, "`exp`"),
        ("exp", json!("tomorrow"), "`exp`"),
        ("nbf", json!(now() + 120), ""),
        ("nbf", json!("yesterday"), "`nbf`"),
        ("aud", json!("another"), "audience"),
        ("aud", Value::Null, "`aud`"),
        ("iss", json!("https://issuer.test"), "issuer"),
        ("iss", Value::Null, "`iss`"),
        ("sub", Value::Null, "`sub`"),
        ("sub", json!(""), "`sub`"),
        ("sub", json!("team-a\n"), "`sub`"),
    ] {
        known.refuses(&with(name, value), words);
    }
}

#[test]
fn a_token_that_nobody_has_signed_is_refused() {
    let known = Known::start();
    let (key, claims) = (&known.key, known.issuer.claims("team-a"));
    known.refuses(&Key::new("first").sign(&claims), "signature");
    let header = |algorithm: &str| json!({ "alg": algorithm, "kid": "first" });
    known.refuses(&format!("{}.", unsigned(&header("none"), &claims)), "JWT");
    let shared = hmac::Key::new(hmac::HMAC_SHA256, key.pair.public_key().as_ref());
    let message = unsigned(&header("HS256"), &claims);
    let signature = BASE64_URL_SAFE_NO_PAD.encode(hmac::sign(&shared, message.as_bytes()));
    known.refuses(&format!("{message}.{signature}"), "HS256");
    let critical = json!({ "alg": "ES256", "kid": "first", "crit": ["exp"] });
    known.refuses(&key.sign_as(&critical, &claims), "JWT");
    let token = known.token();
    known.refuses(&token[..token.len() - 2], "");
    known.refuses("a.b.c", "JWT");
    known.refuses(&"a".repeat(13 << 10), "12288 bytes");
}

/// Before the shim refuses an unknown key, it asks the issuer once more.
#[test]
fn a_token_of_a_key_that_the_issuer_has_not_is_refused() {
    let known = Known::start();
    let claims = known.issuer.claims("team-a");
    let second = Key::new("second").sign(&claims);
    let header = json!({ "alg": "RS256", "kid": "first" });
    let other = known.key.sign_as(&header, &claims);
    std::thread::scope(|scope| {
        scope.spawn(|| known.refuses(&second, "\"second\""));
        scope.spawn(|| known.refuses(&other, "\"first\""));
    });
}

/// The shim accepts an issuer's new keys within seconds, and the last ones while the issuer is
/// away. The log contains no token.
#[test]
fn keys_hold_as_the_issuer_last_had_them() {
    let mut known = Known::start();
    let token = known.token();
    known.shown(&token).unwrap();
    let next = Key::new("next");
    known.issuer.has(&[&next]);
    let of_next = next.sign(&known.issuer.claims("team-b"));
    wait_until("the new key", LIMIT, || {
        known.shown(&of_next).map_err(|status| status.to_string())
    });
    known.refuses(&token, "\"first\"");
    known.issuer.leave();
    known.shown(&of_next).unwrap();
    for secret in [&token, &of_next] {
        known.has_not_logged(secret);
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
            let options = [&[option, url], &audience[..]].concat();
            refused(&options, &format!("`{url}`: allowed are https URLs"));
        }
    }
}
