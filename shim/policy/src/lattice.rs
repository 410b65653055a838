//! What is known of data: who may have shaped it, and who may see it.

use serde::{Deserialize, Serialize};

/// Who may have shaped data. The order is the lattice's: the least of several holds for what is
/// made of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Integrity {
    /// Somebody outside: a fetched page, a file of unknown origin, a tool's output.
    Untrusted,
    Unknown,
    /// The user, or the operator.
    Trusted,
}

/// Who may see data. The greatest of several holds for what is made of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Confidentiality {
    Public,
    Sensitive,
    Secret,
}

/// Both together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Label {
    pub integrity: Integrity,
    pub confidentiality: Confidentiality,
}

impl Label {
    pub const USER: Self = Self {
        integrity: Integrity::Trusted,
        confidentiality: Confidentiality::Public,
    };
    pub const EXTERNAL: Self = Self {
        integrity: Integrity::Untrusted,
        confidentiality: Confidentiality::Public,
    };
    pub const CREDENTIAL: Self = Self {
        integrity: Integrity::Trusted,
        confidentiality: Confidentiality::Secret,
    };

    /// Of data that is made of both.
    #[must_use]
    pub fn join(self, other: Self) -> Self {
        Self {
            integrity: self.integrity.min(other.integrity),
            confidentiality: self.confidentiality.max(other.confidentiality),
        }
    }
}

impl Integrity {
    /// The name in rules, tokens and records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Untrusted => "untrusted",
            Self::Unknown => "unknown",
            Self::Trusted => "trusted",
        }
    }
}

impl Confidentiality {
    /// The name in rules, tokens and records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Sensitive => "sensitive",
            Self::Secret => "secret",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn label() -> impl Strategy<Value = Label> {
        let integrity = prop::sample::select(vec![
            Integrity::Untrusted,
            Integrity::Unknown,
            Integrity::Trusted,
        ]);
        let confidentiality = prop::sample::select(vec![
            Confidentiality::Public,
            Confidentiality::Sensitive,
            Confidentiality::Secret,
        ]);
        (integrity, confidentiality).prop_map(|(integrity, confidentiality)| Label {
            integrity,
            confidentiality,
        })
    }

    proptest! {
        #[test]
        fn joining_depends_neither_on_order_nor_on_repetition(a in label(), b in label(), c in label()) {
            prop_assert_eq!(a.join(b), b.join(a));
            prop_assert_eq!(a.join(b).join(c), a.join(b.join(c)));
            prop_assert_eq!(a.join(a), a);
        }

        #[test]
        fn joining_never_raises_integrity_nor_lowers_confidentiality(a in label(), b in label()) {
            let joined = a.join(b);
            prop_assert!(joined.integrity <= a.integrity && joined.integrity <= b.integrity);
            prop_assert!(joined.confidentiality >= a.confidentiality);
        }
    }
}
