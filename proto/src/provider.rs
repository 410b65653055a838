//! What a slot is for, by the names that callers, configuration and wire use: the CLI of a
//! vendor of models, or scripts.

use std::{fmt, str::FromStr};

/// What a slot is for. The same name is used everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "grpc", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "grpc", serde(try_from = "String", into = "&str"))]
pub enum Provider {
    /// The CLI of a vendor, and what else a caller starts beside it.
    Cli(Vendor),
    /// Scripts in Python. No model, no key and no network.
    Python,
}

/// A vendor of models: it has an API, keys for it, and a CLI that uses them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Vendor {
    OpenAi,
    Anthropic,
    Google,
}

/// A name that does not belong to a provider.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`provider` is `{given}`; must be one of openai, anthropic, google, python")]
pub struct Unknown {
    pub given: String,
}

/// A name that does not belong to a provider with a model.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`provider` is `{given}`; must be one of openai, anthropic, google")]
pub struct NoVendor {
    pub given: String,
}

impl Provider {
    /// Every provider, in the order of the documentation.
    pub fn all() -> impl Iterator<Item = Self> {
        Vendor::all().map(Self::Cli).chain([Self::Python])
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cli(vendor) => vendor.name(),
            Self::Python => "python",
        }
    }

    /// The provider of this name. Unlike [`FromStr`], it accepts no alias.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|provider| provider.name() == name)
    }

    /// Who has the models.
    ///
    /// # Errors
    /// [`NoVendor`] for scripts.
    pub fn vendor(self) -> Result<Vendor, NoVendor> {
        match self {
            Self::Cli(vendor) => Ok(vendor),
            Self::Python => Err(NoVendor {
                given: self.name().to_owned(),
            }),
        }
    }
}

impl Vendor {
    /// Every vendor, in the order of the documentation.
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

    /// The vendor of this name. Unlike [`FromStr`], it accepts no alias.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|vendor| vendor.name() == name)
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

impl From<Vendor> for Provider {
    fn from(vendor: Vendor) -> Self {
        Self::Cli(vendor)
    }
}

impl FromStr for Provider {
    type Err = Unknown;

    fn from_str(given: &str) -> Result<Self, Unknown> {
        match given.parse::<Vendor>() {
            Ok(vendor) => Ok(Self::Cli(vendor)),
            Err(NoVendor { given }) => Self::named(&given).ok_or(Unknown { given }),
        }
    }
}

impl FromStr for Vendor {
    type Err = NoVendor;

    fn from_str(given: &str) -> Result<Self, NoVendor> {
        let found = Self::all().find(|vendor| [vendor.name(), vendor.alias()].contains(&given));
        found.ok_or_else(|| NoVendor {
            given: given.to_owned(),
        })
    }
}

impl TryFrom<String> for Provider {
    type Error = Unknown;

    /// What was written: no alias.
    fn try_from(given: String) -> Result<Self, Unknown> {
        Self::named(&given).ok_or(Unknown { given })
    }
}

impl From<Provider> for &'static str {
    fn from(provider: Provider) -> Self {
        provider.name()
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for Vendor {
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
            {
                let written = serde_json::to_value(provider).unwrap();
                assert_eq!(written, provider.name(), "{provider}");
                let read: Provider = serde_json::from_value(written).unwrap();
                assert_eq!(read, provider);
            }
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
            assert_eq!(alias.parse::<Vendor>().unwrap().to_string(), name);
        }
        assert_eq!(Provider::named("codex"), None);
        assert!("Codex".parse::<Provider>().is_err());
        assert!("".parse::<Provider>().is_err());
    }

    #[test]
    fn a_name_that_is_unknown_is_refused_with_those_that_are_known() {
        let refused = "codecs".parse::<Provider>().unwrap_err().to_string();
        let words = "`provider` is `codecs`; must be one of openai, anthropic, google, python";
        assert_eq!(refused, words);
        let known: Vec<_> = Provider::all().map(Provider::name).collect();
        assert!(refused.ends_with(&known.join(", ")), "{refused}");
    }

    #[test]
    fn scripts_have_no_vendor_and_the_refusal_names_who_is_one() {
        let refused = Provider::Python.vendor().unwrap_err().to_string();
        let known: Vec<_> = Vendor::all().map(Vendor::name).collect();
        let words = format!(
            "`provider` is `python`; must be one of {}",
            known.join(", ")
        );
        assert_eq!(refused, words);
        assert_eq!("python".parse::<Vendor>().unwrap_err().to_string(), refused);
    }
}
