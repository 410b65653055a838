//! The providers, by the names that callers, configuration and wire use.

use std::{fmt, str::FromStr};

/// One provider. The same name is used everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "grpc", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "grpc", serde(rename_all = "lowercase"))]
pub enum Provider {
    OpenAi,
    Anthropic,
    Google,
}

/// A name that does not belong to a provider.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`provider` is `{given}`; must be one of openai, anthropic, google")]
pub struct Unknown {
    pub given: String,
}

impl Provider {
    /// Every provider, in the order of the documentation.
    pub fn all() -> impl Iterator<Item = Self> {
        [Self::OpenAi, Self::Anthropic, Self::Google].into_iter()
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::OpenAi => "openai",
            Self::Anthropic => "anthropic",
            Self::Google => "google",
        }
    }

    /// The provider of this name. Unlike [`FromStr`], it accepts no alias.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|provider| provider.name() == name)
    }

    /// An alias that callers of earlier systems use.
    fn alias(self) -> &'static str {
        match self {
            Self::OpenAi => "codex",
            Self::Anthropic => "claude_code",
            Self::Google => "gemini_cli",
        }
    }
}

impl FromStr for Provider {
    type Err = Unknown;

    fn from_str(given: &str) -> Result<Self, Unknown> {
        let found =
            Self::all().find(|provider| [provider.name(), provider.alias()].contains(&given));
        found.ok_or_else(|| Unknown {
            given: given.to_owned(),
        })
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_as_it_is_written() {
        for provider in Provider::all() {
            assert_eq!(provider.to_string().parse::<Provider>(), Ok(provider));
            assert_eq!(Provider::named(provider.name()), Some(provider));
            #[cfg(feature = "grpc")]
            assert_eq!(
                serde_json::to_value(provider).unwrap(),
                provider.name(),
                "{provider}"
            );
        }
    }

    #[test]
    fn aliases_are_taken_and_not_given() {
        for (alias, name) in [
            ("codex", "openai"),
            ("claude_code", "anthropic"),
            ("gemini_cli", "google"),
        ] {
            assert_eq!(alias.parse::<Provider>().unwrap().to_string(), name);
        }
        assert_eq!(Provider::named("codex"), None);
        assert!("Codex".parse::<Provider>().is_err());
        assert!("".parse::<Provider>().is_err());
    }

    #[test]
    fn a_name_that_is_unknown_is_refused_with_those_that_are_known() {
        let refused = "codecs".parse::<Provider>().unwrap_err().to_string();
        let words = "`provider` is `codecs`; must be one of openai, anthropic, google";
        assert_eq!(refused, words);
        let known: Vec<_> = Provider::all().map(Provider::name).collect();
        assert!(refused.ends_with(&known.join(", ")), "{refused}");
    }
}
