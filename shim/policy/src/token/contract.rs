//! What an execution contract binds, for the two sinks that have one in existing programs (MVAR
//! 1.5.3, `execution_contract_v1`). It has the names of variables and headers alone: the values are
//! in a token's `arguments_hash`.

use serde_json::{Map, Value, json};
use url::Url;

use crate::{canonical, evaluate::Call};

/// The version that a token names.
pub const VERSION: &str = "execution_contract_v1";

/// What is hashed for a call; `None` for a sink without a contract.
#[must_use]
pub fn of(call: &Call) -> Option<Value> {
    match (call.tool, call.action) {
        ("bash", "exec") => Some(bash(call)),
        ("http", "post") => Some(http(call)),
        _ => None,
    }
}

fn bash(call: &Call) -> Value {
    json!({
        "tool": "bash",
        "action": "exec",
        "target": call.target,
        "command": text(call.arguments.get("command")).unwrap_or_else(|| call.target.into()),
        "env_keys": names(call.arguments.get("env"), str::to_owned),
    })
}

fn http(call: &Call) -> Value {
    let full = match call.target {
        target if target.contains("://") => target.to_owned(),
        target => format!("https://{target}"),
    };
    let url = Url::parse(&full).ok();
    let url = url.as_ref();
    let method = text(call.arguments.get("method")).unwrap_or_else(|| "POST".into());
    let path = url.map_or("/", Url::path);
    json!({
        "tool": "http",
        "action": "post",
        "target": call.target,
        "method": method.to_uppercase(),
        "scheme": url.map_or("https", Url::scheme),
        "hostname": url.and_then(Url::host_str).unwrap_or_default(),
        "port": url.and_then(Url::port_or_known_default).unwrap_or(443),
        "path": path,
        "query": url.and_then(Url::query).unwrap_or_default(),
        "header_keys": names(call.arguments.get("headers"), str::to_lowercase),
        "body_hash": body(call.arguments),
    })
}

fn body(arguments: &Value) -> String {
    let body = arguments.get("body").or_else(|| arguments.get("data"));
    match body {
        None | Some(Value::Null) => String::new(),
        Some(body @ (Value::Object(_) | Value::Array(_))) => canonical::hash(body),
        Some(body) => canonical::sha256(text(Some(body)).unwrap_or_default().as_bytes()),
    }
}

/// A value as Python's `str` has it.
fn text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::Null => Some("None".into()),
        Value::Bool(true) => Some("True".into()),
        Value::Bool(false) => Some("False".into()),
        Value::String(text) => Some(text.clone()),
        other => Some(canonical::text(other)),
    }
}

fn names(members: Option<&Value>, form: impl Fn(&str) -> String) -> Vec<String> {
    let members = members.and_then(Value::as_object).map(Map::keys);
    let mut names: Vec<_> = members
        .into_iter()
        .flatten()
        .map(|name| form(name))
        .collect();
    names.sort_unstable();
    names
}
