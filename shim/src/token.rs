//! Callers who show a token (RFC 6750): a JWT that an issuer has made out for them. [`keys`] has
//! the issuer's keys, [`signature`] checks what they have signed.

mod keys;
mod signature;

use jsonwebtoken::{Algorithm, Validation, errors::ErrorKind};
use serde::Deserialize;

use crate::access::Caller;
use keys::Keys;

/// By how many seconds the issuer's clock may differ from this machine's.
const CLOCKS: u64 = 60;
/// A token is in a header, of which there are 16 KiB.
const TOKEN_MOST: usize = 12 << 10;
/// Bytes of a subject; as many as a certificate's name may have.
const SUBJECT_MOST: usize = 1024;

/// Whose tokens are taken.
#[derive(Debug, Clone, clap::Args)]
pub struct Settings {
    /// The issuer of tokens that callers may show: an https URL with an OpenID configuration
    /// below it, as its tokens have it in `iss`. [default: no tokens are taken]
    #[arg(
        long,
        env = "POLYDEV_TOKEN_ISSUER",
        value_name = "URL",
        requires = "token_audience"
    )]
    pub token_issuer: Option<String>,
    /// For whom tokens have to be made out: one of their `aud`.
    #[arg(long, env = "POLYDEV_TOKEN_AUDIENCE", value_name = "NAME")]
    pub token_audience: Option<String>,
    /// Where the issuer's keys are (a JWK set), if there is no OpenID configuration: an https
    /// URL, or one of the loopback address. Without --token-issuer any `iss` is taken, or none.
    #[arg(
        long,
        env = "POLYDEV_TOKEN_KEYS",
        value_name = "URL",
        requires = "token_audience"
    )]
    pub token_keys: Option<String>,
}

/// Why tokens cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "--{option} is `{given}`, allowed are https URLs, and http ones of the loopback address"
    )]
    Url { option: &'static str, given: String },
    #[error("--token-audience is of use with --token-issuer or --token-keys")]
    NoIssuer,
    #[error("the issuer's keys cannot be asked for")]
    Client(#[source] reqwest::Error),
}

/// Why a caller is not known by his token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("this shim takes no tokens")]
    NotTaken,
    #[error("the caller has shown neither a certificate nor a token")]
    Nothing,
    #[error("`authorization` is not `Bearer` and a token of at most {TOKEN_MOST} bytes")]
    Header,
    #[error("the token is not a JWT that is understood")]
    Malformed,
    #[error("the token is signed with {algorithm:?}, which is not taken")]
    Algorithm { algorithm: Algorithm },
    // It is whatever the caller says, and may go into a log.
    #[error("the issuer has no key {kid:?}")]
    UnknownKey { kid: String },
    #[error("the token names no key, and the issuer has several")]
    NoKeyNamed,
    #[error("the token's signature is wrong")]
    Signature,
    #[error("the token has expired")]
    Expired,
    #[error("the token does not hold yet")]
    Early,
    #[error("the token is another issuer's")]
    Issuer,
    #[error("the token is made out for another audience")]
    Audience,
    #[error("the token has no `{claim}`, or one that is not understood")]
    Claim { claim: String },
    /// Worth another try; why is in the log alone.
    #[error("the issuer's keys are not to be had")]
    NoKeys,
}

/// What is read of a token, besides what the library looks at.
#[derive(Deserialize)]
struct Claims {
    /// Without one the library says so.
    #[serde(default)]
    sub: String,
}

/// Knows callers by their tokens.
#[derive(Debug)]
pub struct Tokens {
    keys: Keys,
    issuer: Option<String>,
    audience: String,
}

impl Tokens {
    /// `None` if none are to be taken. Nobody is asked for anything yet.
    ///
    /// # Errors
    /// [`Error`]
    pub fn new(settings: &Settings) -> Result<Option<Self>, Error> {
        let Settings {
            token_issuer,
            token_audience,
            token_keys,
        } = settings.clone();
        let keys = match (&token_issuer, token_keys) {
            // The issuer is only compared then, and may have any form.
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
        }))
    }

    /// Keeps the issuer's keys as they are.
    pub async fn keep(&self) {
        self.keys.keep().await;
    }

    /// Whose token it is: `sub:` and its subject.
    ///
    /// # Errors
    /// [`Refused`]
    pub async fn caller(&self, token: &str) -> Result<Caller, Refused> {
        if token.len() > TOKEN_MOST {
            return Err(Refused::Header);
        }
        let header = jsonwebtoken::decode_header(token).map_err(|_| Refused::Malformed)?;
        // Nothing that has to be understood is.
        if header.crit.is_some() {
            return Err(Refused::Malformed);
        }
        if !signature::ALGORITHMS.contains(&header.alg) {
            let algorithm = header.alg;
            return Err(Refused::Algorithm { algorithm });
        }
        let key = self.keys.find(header.kid.as_deref(), header.alg).await?;
        let mut validation = Validation::new(header.alg);
        validation.leeway = CLOCKS;
        validation.validate_nbf = true;
        validation.set_audience(&[&self.audience]);
        validation.set_required_spec_claims(&["exp", "aud", "sub"]);
        if let Some(issuer) = &self.issuer {
            validation.set_issuer(&[issuer]);
            validation.required_spec_claims.insert("iss".into());
        }
        let claims = jsonwebtoken::decode::<Claims>(token, &key, &validation);
        let sub = claims.map_err(|error| refused(error.kind()))?.claims.sub;
        let is_name = (1..=SUBJECT_MOST).contains(&sub.len()) && !sub.chars().any(char::is_control);
        match is_name {
            true => Ok(Caller(format!("sub:{sub}"))),
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
