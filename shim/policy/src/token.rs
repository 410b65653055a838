//! Execution tokens of tool calls: what was decided, signed with a secret that issuer and verifier
//! share (HMAC-SHA256). A token is for one tool, action, target, all arguments, piece of data and
//! policy, for some minutes, and for one use.
//!
//! The form is that of existing programs (MVAR 1.5.3), with two more fields: `arguments_hash`,
//! without which no token is accepted here, and `key_id`.

pub mod contract;

use rand::RngCore;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    canonical,
    decision::Decision,
    evaluate::Call,
    nonces::{self, Nonces},
    secrets::{ALGORITHM, Secrets},
};

/// The default life of a token, in seconds.
pub const DEFAULT_TTL_SECONDS: u32 = 300;
/// Longest life of a token, in seconds; a token that claims more is refused.
pub const MAX_TTL_SECONDS: u32 = 86_400;
/// How far the clocks of issuer and verifier may differ, in seconds.
const MAX_SKEW_SECONDS: i64 = 60;

/// A signed permission to execute one call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    pub tool: String,
    pub action: String,
    pub target_hash: String,
    pub provenance_node_id: String,
    pub policy_hash: String,
    /// RFC 3339, as the next one.
    pub issued_at: String,
    pub expires_at: String,
    pub nonce: String,
    pub algorithm: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contract_version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invocation_hash: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arguments_hash: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    pub signature: String,
}

/// Why a token does not permit a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error("`{0}` is not what was decided")]
    Field(&'static str),
    #[error("it expired at {0}")]
    Expired(String),
    #[error("`{0}` is no time that a token may have")]
    Time(&'static str),
    #[error("it was used before")]
    Used,
    #[error("its signature is wrong")]
    Signature,
    #[error("the store of used tokens failed: {0}")]
    Store(String),
}

impl Token {
    /// Signs what was decided about a call. The token may be used once for each nonce.
    #[must_use]
    pub fn issue(
        decision: &Decision,
        call: &Call,
        has_contract: bool,
        secrets: &Secrets,
        nonce: &str,
        ttl_seconds: u32,
        now: OffsetDateTime,
    ) -> Self {
        let contract = has_contract.then(|| contract::of(call)).flatten();
        let ttl = time::Duration::seconds(ttl_seconds.min(MAX_TTL_SECONDS).into());
        let mut token = Self {
            tool: call.tool.into(),
            action: call.action.into(),
            target_hash: decision.target_hash.clone(),
            provenance_node_id: call.node.0.clone(),
            policy_hash: decision.policy_hash.clone(),
            issued_at: timestamp(now),
            expires_at: timestamp(now + ttl),
            nonce: nonce.into(),
            algorithm: ALGORITHM.into(),
            contract_version: contract.as_ref().map(|_| contract::VERSION.into()),
            invocation_hash: contract.map(|payload| canonical::hash(&payload)),
            arguments_hash: Some(decision.arguments_hash.clone()),
            key_id: Some(secrets.key_id().into()),
            signature: String::new(),
        };
        token.signature = secrets.sign(&token.signed());
        token
    }

    /// The text that is signed: all fields but the signature.
    #[must_use]
    pub fn signed(&self) -> String {
        let mut value = json!(self);
        if let Value::Object(fields) = &mut value {
            fields.remove("signature");
        }
        canonical::text(&value)
    }

    /// Checks that the token permits the call that was decided about, and uses it up.
    ///
    /// # Errors
    /// [`Invalid`]. Only a token that is right in everything is used up.
    pub fn redeem(
        &self,
        decision: &Decision,
        call: &Call,
        has_contract: bool,
        secrets: &Secrets,
        nonces: &mut Nonces,
        now: OffsetDateTime,
    ) -> Result<(), Invalid> {
        self.check_signature(secrets)?;
        let contract = has_contract.then(|| contract::of(call)).flatten();
        let contract = contract.map(|payload| canonical::hash(&payload));
        let version = contract.as_ref().map(|_| contract::VERSION);
        for (name, is_right) in [
            ("algorithm", self.algorithm == ALGORITHM),
            ("tool", self.tool == call.tool),
            ("action", self.action == call.action),
            ("target_hash", self.target_hash == decision.target_hash),
            ("provenance_node_id", self.provenance_node_id == call.node.0),
            ("policy_hash", self.policy_hash == decision.policy_hash),
            (
                "arguments_hash",
                self.arguments_hash.as_ref() == Some(&decision.arguments_hash),
            ),
            (
                "contract_version",
                version.is_none() || self.contract_version.as_deref() == version,
            ),
            (
                "invocation_hash",
                contract.is_none() || self.invocation_hash == contract,
            ),
            ("nonce", !self.nonce.is_empty()),
        ] {
            if !is_right {
                return Err(Invalid::Field(name));
            }
        }
        let read = |name, text: &str| {
            OffsetDateTime::parse(text, &Rfc3339).map_err(|_| Invalid::Time(name))
        };
        let issued = read("issued_at", &self.issued_at)?;
        let expires = read("expires_at", &self.expires_at)?;
        if issued > now + time::Duration::seconds(MAX_SKEW_SECONDS) {
            return Err(Invalid::Time("issued_at"));
        }
        if expires > issued + time::Duration::seconds(MAX_TTL_SECONDS.into()) {
            return Err(Invalid::Time("expires_at"));
        }
        if now >= expires {
            return Err(Invalid::Expired(self.expires_at.clone()));
        }
        nonces
            .consume(&self.nonce, expires, now)
            .map_err(|error| match error {
                nonces::Error::Used => Invalid::Used,
                error => Invalid::Store(polydev_proto::error::chain(&error)),
            })
    }

    fn check_signature(&self, secrets: &Secrets) -> Result<(), Invalid> {
        let key_id = self.key_id.as_deref();
        match secrets.verify(&self.signed(), &self.signature, key_id) {
            true => Ok(()),
            false => Err(Invalid::Signature),
        }
    }
}

/// A nonce that no other token has: 32 random hexadecimal digits.
#[must_use]
pub fn nonce() -> String {
    let mut nonce = [0; 16];
    rand::rng().fill_bytes(&mut nonce);
    hex::encode(nonce)
}

/// As Python has it: with microseconds, unless there are none, and with `+00:00`.
pub(crate) fn timestamp(at: OffsetDateTime) -> String {
    let at = at.to_offset(time::UtcOffset::UTC);
    let whole = time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]");
    let whole = at.format(whole).expect("a time has these parts");
    match at.microsecond() {
        0 => format!("{whole}+00:00"),
        micros => format!("{whole}.{micros:06}+00:00"),
    }
}

#[cfg(test)]
mod tests;
