//! Decodes values as Nomad encodes them (go-cty's msgpack), with the checks that all
//! options share.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::{Deserialize, Deserializer, de, de::DeserializeOwned};

use super::Error;

/// Reads a whole configuration; the error names the field.
pub(super) fn decode<T: DeserializeOwned>(msgpack: &[u8]) -> Result<T, Error> {
    let mut decoder = rmp_serde::Deserializer::from_read_ref(msgpack);
    // Far deeper than any of our schemas, but shallow enough to protect the stack.
    decoder.set_max_depth(32);
    serde_path_to_error::deserialize(&mut decoder).map_err(|error| Error::Decode {
        field: error.path().to_string(),
        source: error.into_inner(),
    })
}

/// The names of the options that are set. Nomad sends every option, unset ones as nil or empty.
pub(super) fn set_options(msgpack: &[u8]) -> Result<impl Iterator<Item = String>, Error> {
    use serde_json::Value;
    let all: BTreeMap<String, Value> = decode(msgpack)?;
    let is_set = |value: &Value| match value {
        Value::Null => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
    };
    Ok(all
        .into_iter()
        .filter(move |(_, value)| is_set(value))
        .map(|(name, _)| name))
}

/// A number as Nomad sends it: any msgpack number, or a decimal string if a float cannot
/// hold it exactly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Number(f64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a number")]
        enum Form {
            Number(f64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(number) => Ok(Self(number)),
            Form::Text(text) => text.parse().map(Self).map_err(de::Error::custom),
        }
    }
}

/// A string or a list of strings.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "a string or a list of strings")]
pub(super) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    pub(super) fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// `list(map(string))`: the type that accepts both `x { a = "b" }` and `x = [{ a = "b" }]`.
pub(super) type Maps = Option<Vec<BTreeMap<String, String>>>;

/// Merges a list of maps; later ones have precedence.
pub(super) fn merged(maps: Maps) -> BTreeMap<String, String> {
    maps.into_iter().flatten().flatten().collect()
}

/// The error for a rejected value.
pub(super) fn refused(
    field: impl Into<String>,
    given: impl std::fmt::Display,
    allowed: impl Into<String>,
) -> Error {
    Error::Value {
        field: field.into(),
        given: given.to_string(),
        allowed: allowed.into(),
    }
}

/// A whole number between two bounds, if one is given.
pub(super) fn whole(
    field: &str,
    given: Option<Number>,
    least: i64,
    most: i64,
) -> Result<Option<i64>, Error> {
    let Some(Number(number)) = given else {
        return Ok(None);
    };
    // A float holds whole numbers up to 2^53 exactly.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the value is checked to be whole and between two i64"
    )]
    let value = number as i64;
    if number.fract() == 0.0 && (least..=most).contains(&value) {
        return Ok(Some(value));
    }
    let allowed = format!("must be a whole number from {least} to {most}");
    Err(refused(field, number, allowed))
}

/// Like [`whole`], with a default.
pub(super) fn ranged(
    field: &str,
    given: Option<Number>,
    default: u32,
    least: u32,
    most: u32,
) -> Result<u32, Error> {
    let value = whole(field, given, least.into(), most.into())?;
    Ok(value.map_or(default, |value| {
        u32::try_from(value).expect("it is between two u32")
    }))
}

/// A duration such as `90s` or `1h30m`, of at most 7 days.
pub(super) fn duration(
    field: &str,
    given: Option<String>,
    default: Duration,
    least: Duration,
) -> Result<Duration, Error> {
    const MAX: Duration = Duration::from_secs(7 * 24 * 3600);
    duration_within(field, given, default, [least, MAX])
}

/// Like [`duration`], with the caller's upper bound.
pub(super) fn duration_within(
    field: &str,
    given: Option<String>,
    default: Duration,
    [least, most]: [Duration; 2],
) -> Result<Duration, Error> {
    let Some(text) = given else {
        return Ok(default);
    };
    let parsed = humantime::parse_duration(&text).ok();
    parsed
        .filter(|value| (least..=most).contains(value))
        .ok_or_else(|| {
            let [least, most] = [least, most].map(humantime::format_duration);
            let allowed =
                format!("must be a duration such as `90s` or `5m`, from {least} to {most}");
            refused(field, &text, allowed)
        })
}

/// An absolute path.
pub(super) fn absolute(field: &str, given: &str) -> Result<PathBuf, Error> {
    let path = PathBuf::from(given);
    if path.is_absolute() {
        return Ok(path);
    }
    Err(refused(field, given, "must be an absolute path"))
}

/// Checks that the value is one of a few words.
pub(super) fn one_of<'a>(field: &str, given: &str, words: &[&'a str]) -> Result<&'a str, Error> {
    let known = words.iter().find(|word| **word == given);
    known
        .copied()
        .ok_or_else(|| refused(field, given, format!("must be one of {}", words.join(", "))))
}

/// `None` for a missing or empty string: in a jobspec both mean "not set".
pub(super) fn text(given: Option<String>) -> Option<String> {
    given.filter(|text| !text.is_empty())
}
