//! Patterns of callers' names.

use std::fmt;

use regex::Regex;
use serde::Deserialize;

/// Longest pattern, in bytes: a token's subject has at most 1,024.
const MAX_PATTERN: usize = 1100;

/// Which callers are meant, by their names (see [`Caller`](crate::connection::Caller)).
///
/// A name has parts, between `:` and `/`. `?` stands for one character of a part, `*` for any
/// characters of a part, and `**` for any characters. `*` alone is everybody. So
/// `sub:global:default:controller:*` does not fit `sub:global:default:controller:x:y`.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern {
    text: String,
    regex: Regex,
}

/// A pattern that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error("a pattern of names has {0} bytes; at most {MAX_PATTERN} are allowed")]
    TooLong(usize),
    #[error("`{0}` is no pattern of names")]
    Unusable(String),
}

impl Pattern {
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        self.regex.is_match(name)
    }
}

impl TryFrom<String> for Pattern {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        if text.len() > MAX_PATTERN {
            return Err(Invalid::TooLong(text.len()));
        }
        let whole = match &*text {
            "*" => "**",
            text => text,
        };
        let parts = whole.split("**").map(|part| {
            regex::escape(part)
                .replace(r"\*", "[^:/]*")
                .replace(r"\?", "[^:/]")
        });
        let parts: Vec<_> = parts.collect();
        match Regex::new(&format!("^(?s:{})$", parts.join(".*"))) {
            Ok(regex) => Ok(Self { text, regex }),
            Err(_) => Err(Invalid::Unusable(text)),
        }
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        Pattern::try_from(pattern.to_owned()).unwrap().matches(name)
    }

    #[test]
    fn a_star_stays_within_its_part() {
        for (pattern, name, is_meant) in [
            ("*", "spiffe://acme/a", true),
            ("*", "", true),
            ("**", "", true),
            ("cn:team-?", "cn:team-a", true),
            ("cn:team-?", "cn:team-", false),
            ("cn:team-?", "cn:team-:", false),
            ("uid:*", "uid:1000", true),
            ("uid:1", "uid:10", false),
            ("uid:1", "xuid:1", false),
            ("sub:g:default:c:*", "sub:g:default:c:x", true),
            // The job `c:x` has a name that looks like job and group.
            ("sub:g:default:c:*", "sub:g:default:c:x:y:shim", false),
            ("sub:g:default:c:*:*:shim", "sub:g:default:c:x:y:shim", true),
            (
                "sub:g:default:c:*:*:shim",
                "sub:g:default:c:x:y:z:shim",
                false,
            ),
            ("sub:g:default:**", "sub:g:default:c:x:y:z:shim", true),
            ("spiffe://acme/*/shim", "spiffe://acme/a/shim", true),
            ("spiffe://acme/*/shim", "spiffe://acme/a/b/shim", false),
            ("spiffe://acme/**/shim", "spiffe://acme/a/b/shim", true),
            ("cn:a.b", "cn:axb", false),
            ("cn:(a|b)", "cn:a", false),
            ("cn:*", "cn:a\nb", true),
        ] {
            assert_eq!(matches(pattern, name), is_meant, "{pattern} and {name}");
        }
    }

    #[test]
    fn a_pattern_without_end_is_refused() {
        let long = "*".repeat(MAX_PATTERN + 1);
        assert_eq!(
            Pattern::try_from(long).unwrap_err(),
            Invalid::TooLong(MAX_PATTERN + 1)
        );
    }
}
