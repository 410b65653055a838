//! The ids of runs, slots and users, and the number of a slot's container.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use uuid::{Builder, Uuid, Version};

/// The id of a run or of a lease: a UUID of version 7, which contains the time when it was
/// made. It is read in every spelling of a UUID, and written in lower case with hyphens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(Uuid);

/// The text is not a UUID of version 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be a UUIDv7")]
pub struct NotARunId;

impl RunId {
    /// A new id.
    #[must_use]
    pub fn now() -> Self {
        Self(Uuid::now_v7())
    }

    /// The id that was made at `made`, in whole milliseconds, with these random bits.
    #[must_use]
    pub fn new(made: SystemTime, random: [u8; 10]) -> Self {
        let since = made.duration_since(SystemTime::UNIX_EPOCH);
        let millis = since.unwrap_or_default().as_millis();
        let millis = u64::try_from(millis).unwrap_or(u64::MAX);
        Self(Builder::from_unix_timestamp_millis(millis, &random).into_uuid())
    }

    /// When it was made, by its maker's clock.
    #[must_use]
    pub fn made_at(self) -> SystemTime {
        let made = self.0.get_timestamp();
        let made = made.expect("a UUID of version 7 contains a time");
        let (seconds, nanos) = made.to_unix();
        // 48 bits of milliseconds always fit.
        SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos)
    }
}

impl FromStr for RunId {
    type Err = NotARunId;

    fn from_str(text: &str) -> Result<Self, NotARunId> {
        let id = Uuid::parse_str(text).map_err(|_| NotARunId)?;
        let is_one = id.get_version() == Some(Version::SortRand);
        is_one.then_some(Self(id)).ok_or(NotARunId)
    }
}

impl TryFrom<String> for RunId {
    type Error = NotARunId;

    fn try_from(text: String) -> Result<Self, NotARunId> {
        text.parse()
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<RunId> for String {
    fn from(id: RunId) -> Self {
        id.to_string()
    }
}

/// An id whose text has no structure for whoever uses it.
macro_rules! opaque {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

opaque! {
    /// The id of a slot in its cluster: `NODE_ID/ALLOC_ID`.
    SlotId
}

opaque! {
    /// The id of a user, chosen by the callers of the shim. The shim checks it where a request
    /// comes in (`parse_user`); the driver takes it as it is.
    UserId
}

/// The number of a slot's container, from 1.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The number of the next container.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_run_id_is_read_as_it_is_written_and_tells_its_time(
            millis in 0u64..1 << 48,
            random in any::<[u8; 10]>(),
        ) {
            let made = SystemTime::UNIX_EPOCH + Duration::from_millis(millis);
            let id = RunId::new(made, random);
            prop_assert_eq!(id.made_at(), made);
            prop_assert_eq!(id.to_string().parse(), Ok(id));
            prop_assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
            prop_assert_eq!(serde_json::from_str::<RunId>(&format!("\"{id}\"")).unwrap(), id);
        }
    }

    #[test]
    fn what_is_no_uuid_of_version_7_is_no_run_id() {
        for other in [String::new(), "42".into(), Uuid::new_v4().to_string()] {
            assert_eq!(other.parse::<RunId>(), Err(NotARunId));
            let json = serde_json::to_string(&other).unwrap();
            assert!(serde_json::from_str::<RunId>(&json).is_err());
        }
    }
}
