//! The parts of a request that the stand-in model API keeps.

use std::collections::BTreeMap;

use serde_json::Value;
use sha2::{Digest, Sha256};

/// One request that arrived.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Received {
    pub method: String,
    /// When its headers and body had arrived, in milliseconds since 1970.
    pub at_ms: f64,
    pub path: String,
    /// Credential headers, lower-case name to value.
    pub credentials: BTreeMap<String, String>,
    /// What the user said, in order.
    pub texts: Vec<Text>,
    /// The whole request, for the last few; null for earlier ones.
    pub body: Value,
}

/// A text's length and hash, which identify the text without keeping it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Text {
    pub bytes: usize,
    /// Lower-case hex.
    pub sha256: String,
}

/// What the stand-in answers to a prompt.
#[must_use]
pub fn answer(prompt: &str) -> String {
    let Text { bytes, sha256 } = Text::of(prompt);
    format!("The stand-in read {bytes} bytes, sha256 {sha256}.")
}

impl Text {
    #[must_use]
    pub fn of(text: &str) -> Self {
        Self {
            bytes: text.len(),
            sha256: hex::encode(Sha256::digest(text)),
        }
    }
}
