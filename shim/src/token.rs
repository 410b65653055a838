//! Callers who present a token (RFC 6750): a JWT that an issuer has made for them. [`keys`]
//! fetches the issuer's keys. [`signature`] checks the signatures.

mod keys;
mod signature;

use std::collections::HashMap;

use jsonwebtoken::{Algorithm, Validation, errors::ErrorKind};
use serde::Deserialize;
use serde_json::Value;

use keys::Keys;

/// By how many seconds the issuer's clock may differ from this machine's.
const MAX_CLOCK_SKEW: u64 = 60;
/// A token is in a header, and all headers together may have 16 KiB.
const MAX_TOKEN: usize = 12 << 10;
/// Bytes of a subject: as many as the name in a certificate may have.
const MAX_SUBJECT: usize = 1024;

/// Which tokens the shim accepts.
#[derive(Debug, Clone, clap::Args)]
pub struct Settings {
    /// The issuer whose tokens callers may present: an https URL with an OpenID configuration
    /// below it, exactly as in `iss` of the tokens. [default: no tokens are accepted]
    #[arg(
        long,
        env = "POLYDEV_TOKEN_ISSUER",
        value_name = "URL",
        requires = "token_audience"
    )]
    pub token_issuer: Option<String>,
    /// The audience that tokens must be issued for: their `aud` must contain this name.
    #[arg(long, env = "POLYDEV_TOKEN_AUDIENCE", value_name = "NAME")]
    pub token_audience: Option<String>,
    /// URL of the issuer's keys (a JWK set), if the issuer has no OpenID configuration: https, or
    /// http of the loopback address. Without --token-issuer the shim does not check `iss`.
    #[arg(
        long,
        env = "POLYDEV_TOKEN_KEYS",
        value_name = "URL",
        requires = "token_audience"
    )]
    pub token_keys: Option<String>,
    /// The claim that says which user a caller is, for roles with `users = ["{caller}"]`.
    #[arg(
        long,
        env = "POLYDEV_TOKEN_USER",
        value_name = "CLAIM",
        default_value = "sub"
    )]
    pub token_user: String,
}

/// Why the shim cannot accept tokens.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "--{option} is `{given}`: allowed are https URLs, and http URLs of the loopback address"
    )]
    Url { option: &'static str, given: String },
    #[error("--token-audience requires --token-issuer or --token-keys")]
    NoIssuer,
    #[error("cannot create the client that fetches the issuer's keys")]
    Client(#[source] reqwest::Error),
}

/// Why a token does not identify a caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("this shim accepts no tokens")]
    NotTaken,
    #[error("the caller has presented neither a certificate nor a token")]
    Nothing,
    #[error("`authorization` must be `Bearer` and one token of at most {MAX_TOKEN} bytes")]
    Header,
    #[error("the token is not a JWT that this shim understands")]
    Malformed,
    #[error("the token is signed with {algorithm:?}, which this shim does not accept")]
    Algorithm { algorithm: Algorithm },
    // The caller chooses the id, which may go into a log: `:?` escapes it.
    #[error("the issuer has no key {kid:?}")]
    UnknownKey { kid: String },
    #[error("the token names no key (`kid`), and the issuer has several keys")]
    NoKeyNamed,
    #[error("the token's signature is not valid")]
    Signature,
    #[error("the token has expired")]
    Expired,
    #[error("the token is not valid yet")]
    Early,
    #[error("the token is from another issuer")]
    Issuer,
    #[error("the token is for another audience")]
    Audience,
    #[error("the token's claim `{claim}` is missing or not valid")]
    Claim { claim: String },
    /// The caller may try again. Only the log has the cause.
    #[error("the issuer's keys are not available")]
    NoKeys,
}

/// The claims that this module reads. The library checks others.
#[derive(Deserialize)]
struct Claims {
    /// Empty if missing: the library rejects a token without this claim.
    #[serde(default)]
    sub: String,
    #[serde(flatten)]
    others: HashMap<String, Value>,
}

impl Claims {
    /// The text of a claim.
    fn text(&self, claim: &str) -> Option<String> {
        match claim {
            "sub" => Some(self.sub.clone()),
            other => Some(self.others.get(other)?.as_str()?.to_owned()),
        }
    }
}

/// Whom a token is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// `sub:` and the token's subject.
    pub name: String,
    /// The user that the issuer says they are. `None` if the token does not have the claim.
    pub user: Option<String>,
}

/// Identifies callers by their tokens.
#[derive(Debug)]
pub struct Tokens {
    keys: Keys,
    issuer: Option<String>,
    audience: String,
    /// The claim with the user.
    user: String,
}

impl Tokens {
    /// `None` if the shim accepts no tokens. This call fetches nothing.
    ///
    /// # Errors
    /// [`Error`]
    pub fn new(settings: &Settings) -> Result<Option<Self>, Error> {
        let Settings {
            token_issuer,
            token_audience,
            token_keys,
            token_user,
        } = settings.clone();
        let keys = match (&token_issuer, token_keys) {
            // The issuer is only compared with `iss`, and may have any form.
            (_, Some(keys)) => {
                keys::check_url("token-keys", &keys)?;
                Keys::at(keys)?
            }
            (Some(issuer), None) => {
                keys::check_url("token-issuer", issuer)?;
                Keys::of_issuer(issuer.clone())?
            }
            (None, None) if token_audience.is_some() => return Err(Error::NoIssuer),
            (None, None) => return Ok(None),
        };
        signature::install();
        Ok(Some(Self {
            keys,
            issuer: token_issuer,
            audience: token_audience.unwrap_or_default(),
            user: token_user,
        }))
    }

    /// Keeps the issuer's keys up to date. Never returns.
    pub async fn keep(&self) {
        self.keys.keep().await;
    }

    /// Whom the token identifies.
    ///
    /// # Errors
    /// [`Refused`]
    pub async fn subject(&self, token: &str) -> Result<Subject, Refused> {
        if token.len() > MAX_TOKEN {
            return Err(Refused::Header);
        }
        let header = jsonwebtoken::decode_header(token).map_err(|_| Refused::Malformed)?;
        // `crit` names extensions that the recipient must support. This shim supports none.
        if header.crit.is_some() {
            return Err(Refused::Malformed);
        }
        if !signature::ALGORITHMS.contains(&header.alg) {
            let algorithm = header.alg;
            return Err(Refused::Algorithm { algorithm });
        }
        let key = self.keys.find(header.kid.as_deref(), header.alg).await?;
        let mut validation = Validation::new(header.alg);
        validation.leeway = MAX_CLOCK_SKEW;
        validation.validate_nbf = true;
        validation.set_audience(&[&self.audience]);
        validation.set_required_spec_claims(&["exp", "aud", "sub"]);
        if let Some(issuer) = &self.issuer {
            validation.set_issuer(&[issuer]);
            validation.required_spec_claims.insert("iss".into());
        }
        let claims = jsonwebtoken::decode::<Claims>(token, &key, &validation);
        let claims = claims.map_err(|error| refused(error.kind()))?.claims;
        let (sub, user) = (&claims.sub, claims.text(&self.user));
        let is_name = (1..=MAX_SUBJECT).contains(&sub.len()) && !sub.chars().any(char::is_control);
        match is_name {
            true => Ok(Subject {
                name: format!("sub:{sub}"),
                user,
            }),
            false => Err(Refused::Claim {
                claim: "sub".into(),
            }),
        }
    }
}

fn refused(kind: &ErrorKind) -> Refused {
    match kind {
        ErrorKind::InvalidSignature => Refused::Signature,
        ErrorKind::ExpiredSignature => Refused::Expired,
        ErrorKind::ImmatureSignature => Refused::Early,
        ErrorKind::InvalidIssuer => Refused::Issuer,
        ErrorKind::InvalidAudience => Refused::Audience,
        ErrorKind::MissingRequiredClaim(claim) | ErrorKind::InvalidClaimFormat(claim) => {
            Refused::Claim {
                claim: claim.clone(),
            }
        }
        _ => Refused::Malformed,
    }
}
