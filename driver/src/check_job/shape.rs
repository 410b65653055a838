//! Gives a task's options the form in which Nomad sends them to a driver: blocks without their
//! lists, and texts and numbers as the schema has them.

use polydev_proto::hclspec::{Spec, spec::Block};
use serde_json::{Map, Value};

/// Shapes options. Those that the schema does not have are left out.
pub(super) fn shape(spec: &Spec, given: &Value) -> Value {
    match &spec.block {
        Some(Block::Object(object)) => {
            let shaped = object.attributes.iter().filter_map(|(name, child)| {
                let value = given.get(name).filter(|value| !value.is_null())?;
                Some((name.clone(), shape(child, value)))
            });
            Value::Object(shaped.collect())
        }
        Some(Block::Attr(attr)) => attribute(&attr.r#type, given),
        Some(Block::BlockValue(block)) => match (&block.nested, one(given)) {
            (Some(nested), given) => shape(nested, given),
            (None, given) => given.clone(),
        },
        Some(Block::BlockList(list)) => match &list.nested {
            Some(nested) => many(given).map(|given| shape(nested, given)).collect(),
            None => given.clone(),
        },
        Some(Block::BlockAttrs(_)) => strings(one(given)),
        _ => given.clone(),
    }
}

fn attribute(kind: &str, given: &Value) -> Value {
    match kind {
        "string" => text(given),
        "bool" => match given.as_str() {
            Some("true") => true.into(),
            Some("false") => false.into(),
            _ => given.clone(),
        },
        "number" => number(given),
        "list(string)" => match given {
            Value::Array(list) => list.iter().map(text).collect(),
            other => other.clone(),
        },
        "list(map(string))" => many(given).map(strings).collect(),
        "list(map(number))" => many(given).map(|map| entries(map, number)).collect(),
        _ => given.clone(),
    }
}

/// A block that may appear once, as JSON has it: alone, or in a list.
fn one(given: &Value) -> &Value {
    match given {
        Value::Array(list) if list.len() == 1 => &list[0],
        other => other,
    }
}

fn many(given: &Value) -> impl Iterator<Item = &Value> {
    match given {
        Value::Array(list) => list.as_slice(),
        other => std::slice::from_ref(other),
    }
    .iter()
}

fn strings(given: &Value) -> Value {
    entries(given, text)
}

fn entries(given: &Value, each: impl Fn(&Value) -> Value) -> Value {
    match given {
        Value::Object(map) => {
            let entries = map.iter().map(|(name, value)| (name.clone(), each(value)));
            Value::Object(entries.collect::<Map<_, _>>())
        }
        other => other.clone(),
    }
}

fn text(given: &Value) -> Value {
    match given {
        Value::Number(number) => number.to_string().into(),
        Value::Bool(word) => word.to_string().into(),
        other => other.clone(),
    }
}

fn number(given: &Value) -> Value {
    let parsed = given.as_str().and_then(|text| text.parse::<f64>().ok());
    parsed.map_or_else(|| given.clone(), Value::from)
}
