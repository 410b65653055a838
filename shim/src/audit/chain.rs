//! Binds each line to all lines before it: its code (HMAC-SHA256) is over the previous line's code
//! and its own text. Who has no key can make neither a line nor a code.

use std::path::Path;

use ring::hmac;
use serde::{Deserialize, Serialize};

use super::{Error, record::Record};
use crate::private;

/// The code of a line.
pub type Code = [u8; 32];

/// What comes before the first line of all.
pub const BEGIN: Code = [0; 32];
/// Between a line's text and its code.
const CODE: &str = ",\"code\":\"";
/// What a line ends with, after its code.
const END: &str = "\"}";

/// A secret that only the shim and whoever verifies its log know.
#[derive(Debug, Clone)]
pub struct Key(hmac::Key);

impl Key {
    /// Reads a file with 64 hexadecimal digits, for example of `openssl rand -hex 32`.
    ///
    /// # Errors
    /// If the file cannot be read, can be read by everyone or contains something else.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = private::read(path)?;
        let mut key = [0; 32];
        hex::decode_to_slice(text.trim_ascii(), &mut key)
            .map_err(|_| Error::NoKey { path: path.into() })?;
        Ok(Self::new(&key))
    }

    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// The code of a text that follows a line with the code `previous`.
    #[must_use]
    pub fn code(&self, previous: &Code, text: &str) -> Code {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(previous);
        context.update(text.as_bytes());
        let mut code = Code::default();
        code.copy_from_slice(context.sign().as_ref());
        code
    }
}

/// A line: a record with its number and time, or the begin of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Counts from 1, over all files.
    pub number: u64,
    /// RFC 3339, UTC.
    pub time: String,
    #[serde(flatten)]
    pub entry: Entry,
}

/// What a line is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Entry {
    /// The first line of a file: the code of the line before, in another file.
    Begin {
        previous: String,
    },
    Record(Record),
}

impl Line {
    /// The line as it is in a file, without its end, and its code.
    #[must_use]
    pub fn write(&self, key: &Key, previous: &Code) -> (String, Code) {
        let mut text = serde_json::to_string(self).expect("a line has names and texts alone");
        // The code takes the place of the last bracket.
        text.pop();
        let code = key.code(previous, &text);
        (format!("{text}{CODE}{}{END}", hex::encode(code)), code)
    }

    /// The line, and the code that is right for it after `previous`; `None` for the code if the
    /// line has another one.
    #[must_use]
    pub fn read(key: &Key, previous: &Code, text: &str) -> Option<(Self, Option<Code>)> {
        let (own, code) = text.strip_suffix(END)?.rsplit_once(CODE)?;
        let line = serde_json::from_str(&format!("{own}}}")).ok()?;
        let right = key.code(previous, own);
        let is_right = hex::encode(right) == code;
        Some((line, is_right.then_some(right)))
    }
}
