//! Looks at a job's JSON, of which any part may be missing.

use serde_json::Value;

/// The members of a list.
pub(super) fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// A block, alone or in a list.
pub(super) fn blocks(value: &Value) -> impl Iterator<Item = &Value> {
    match value {
        Value::Array(list) => list.as_slice(),
        one => std::slice::from_ref(one),
    }
    .iter()
}

/// A text.
pub(super) fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
