//! Reads the tool calls of a model's answer. OpenAI's APIs and their clients have four shapes of it.

use serde::Serialize;
use serde_json::{Map, Value, json};

/// Longest answer, in bytes.
pub const MAX_PAYLOAD: usize = 4 << 20;
/// Most calls of one answer.
pub const MAX_CALLS: usize = 256;

/// One call, as the model has written it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ToolCall {
    /// The API's id of the call, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Missing if the model has named no tool.
    pub name: Option<String>,
    pub arguments: Value,
}

/// Text that is not the answer of a model.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    #[error("the payload has {0} bytes, at most {MAX_PAYLOAD} are allowed")]
    Long(usize),
    #[error("the payload is not JSON")]
    NotJson(#[from] serde_json::Error),
    #[error(
        "the payload must be a list of calls, or an object with `tool_calls`, `choices`, `output` or `function_call`"
    )]
    Shape,
    #[error("`{0}` of the payload is of another type than it must be")]
    Member(&'static str),
    #[error("the payload has {0} calls, at most {MAX_CALLS} are allowed")]
    Many(usize),
}

/// The calls of an answer, in its order.
///
/// # Errors
/// [`Unreadable`]
pub fn calls(text: &str) -> Result<Vec<ToolCall>, Unreadable> {
    if text.len() > MAX_PAYLOAD {
        return Err(Unreadable::Long(text.len()));
    }
    let payload: Value = serde_json::from_str(text)?;
    let mut items: Vec<&Value> = Vec::new();
    match &payload {
        Value::Array(calls) => items.extend(calls),
        Value::Object(answer) => {
            let known = ["tool_calls", "choices", "output", "function_call"];
            if !known.iter().any(|name| answer.contains_key(*name)) {
                return Err(Unreadable::Shape);
            }
            items.extend(list(answer, "tool_calls")?);
            for choice in list(answer, "choices")? {
                let message = match choice.get("message") {
                    None | Some(Value::Null) => continue,
                    Some(message) => message.as_object().ok_or(Unreadable::Member("message"))?,
                };
                items.extend(list(message, "tool_calls")?);
                items.extend(message.get("function_call").filter(|call| !call.is_null()));
            }
            // Text, reasoning, and what the API has executed itself are items of the output too.
            items.extend(list(answer, "output")?.iter().filter(|item| is_call(item)));
            items.extend(answer.get("function_call").filter(|call| !call.is_null()));
        }
        _ => return Err(Unreadable::Shape),
    }
    if items.len() > MAX_CALLS {
        return Err(Unreadable::Many(items.len()));
    }
    Ok(items.into_iter().map(ToolCall::read).collect())
}

/// The member, which may be missing.
fn list<'a>(object: &'a Map<String, Value>, name: &'static str) -> Result<&'a [Value], Unreadable> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(items)) => Ok(items),
        Some(_) => Err(Unreadable::Member(name)),
    }
}

/// An item of the Responses API without a type is a call.
fn is_call(item: &Value) -> bool {
    let kind = item.get("type").and_then(Value::as_str);
    kind.is_none_or(|kind| matches!(kind, "function_call" | "custom_tool_call"))
}

impl ToolCall {
    /// What cannot be read is a call without a name: it counts, and is blocked.
    fn read(item: &Value) -> Self {
        let text = |of: &Value, names: &[&str]| {
            let mut found = names.iter().filter_map(|name| of.get(*name)?.as_str());
            found.find(|text| !text.is_empty()).map(ToOwned::to_owned)
        };
        let function = item.get("function").filter(|function| function.is_object());
        let (name, given) = match function {
            Some(function) => (text(function, &["name"]), function.get("arguments")),
            None => (
                text(item, &["name", "tool", "tool_name"]),
                item.get("arguments").or_else(|| item.get("input")),
            ),
        };
        Self {
            id: text(item, &["call_id", "id"]),
            name,
            arguments: arguments(given),
        }
    }
}

/// Always an object: arguments are JSON in a string, or the value itself.
fn arguments(given: Option<&Value>) -> Value {
    let parsed = match given {
        None | Some(Value::Null) => json!({}),
        Some(Value::String(text)) if text.trim().is_empty() => json!({}),
        Some(Value::String(text)) => {
            serde_json::from_str(text).unwrap_or_else(|_| json!({ "raw": text }))
        }
        Some(value) => value.clone(),
    };
    match parsed {
        object @ Value::Object(_) => object,
        value => json!({ "value": value }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(payload: &Value) -> Vec<Option<String>> {
        let calls = calls(&payload.to_string()).unwrap();
        calls.into_iter().map(|call| call.name).collect()
    }

    #[test]
    fn the_four_shapes_are_read_and_text_is_no_call() {
        let function = json!({ "type": "function", "id": "1", "function": { "name": "a", "arguments": "{\"x\":1}" } });
        let flat = json!({ "type": "function_call", "call_id": "2", "name": "b", "arguments": { "x": 2 } });
        let text = json!({ "type": "message", "content": [] });
        let some = |name: &str| Some(name.to_owned());
        assert_eq!(names(&json!([function, flat])), [some("a"), some("b")]);
        assert_eq!(names(&json!({ "tool_calls": [function] })), [some("a")]);
        let choices =
            json!({ "choices": [{ "message": { "tool_calls": [function] } }, { "message": {} }] });
        assert_eq!(names(&choices), [some("a")]);
        assert_eq!(names(&json!({ "output": [text, flat] })), [some("b")]);
        assert_eq!(
            names(&json!({ "function_call": { "name": "c", "arguments": "" } })),
            [some("c")]
        );
        assert_eq!(names(&json!({ "function_call": null, "output": [] })), []);
        let done = json!({ "type": "mcp_call", "name": "a", "arguments": "{}", "output": "x" });
        assert_eq!(names(&json!({ "output": [done] })), []);
        let old = json!({ "message": { "function_call": { "name": "d", "arguments": "{}" } } });
        assert_eq!(names(&json!({ "choices": [old] })), [some("d")]);
        let all = calls(&json!([function, flat]).to_string()).unwrap();
        assert_eq!(all[0].arguments, json!({ "x": 1 }));
        assert_eq!(
            (all[0].id.as_deref(), all[1].id.as_deref()),
            (Some("1"), Some("2"))
        );
    }

    #[test]
    fn what_has_no_name_or_other_arguments_is_a_call_too() {
        let payload = json!([
            { "tool": "a", "input": "not json" },
            { "tool_name": "b", "arguments": "[1]" },
            { "arguments": {} },
            7,
        ]);
        let calls = calls(&payload.to_string()).unwrap();
        assert_eq!(calls[0].arguments, json!({ "raw": "not json" }));
        assert_eq!(calls[1].arguments, json!({ "value": [1] }));
        assert_eq!((&calls[2].name, &calls[3].name), (&None, &None));
        assert_eq!(calls.len(), 4);
    }

    #[test]
    fn other_texts_are_refused() {
        for (text, words) in [
            ("", "not JSON"),
            ("\"x\"", "must be a list"),
            ("{}", "must be a list"),
            ("{\"tool_calls\":{}}", "`tool_calls` of the payload"),
            (
                "{\"choices\":[{\"message\":1}]}",
                "`message` of the payload",
            ),
        ] {
            assert!(
                calls(text).unwrap_err().to_string().contains(words),
                "{text}"
            );
        }
        let many = json!(vec![json!({ "name": "a" }); MAX_CALLS + 1]).to_string();
        assert!(matches!(calls(&many), Err(Unreadable::Many(257))));
        let long = " ".repeat(MAX_PAYLOAD + 1);
        assert!(matches!(calls(&long), Err(Unreadable::Long(_))));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".*") {
            let read = calls(&text);
            let is_json = text.trim_start().starts_with(['[', '{']);
            prop_assert!(read.is_err() || is_json);
        }
    }
}
