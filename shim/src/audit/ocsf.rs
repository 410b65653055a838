//! The Open Cybersecurity Schema Framework, version 1.3: class "API Activity" (6003). Its
//! attributes are those of `events/application/api_activity.json` in github.com/ocsf/ocsf-schema.
//! The status is that of the decision: what was allowed may still have failed.

use std::net::SocketAddr;

use prost_types::Timestamp;
use serde_json::{Value, json};

use super::{
    chain::{Entry, Line},
    record::{Operation, Record},
};

const CLASS: u32 = 6003;
const CATEGORY: u32 = 6;

/// The event of a line. The begin of a file is none.
#[must_use]
pub fn event(line: &Line) -> Option<Value> {
    let Entry::Record(record) = &line.entry else {
        return None;
    };
    let activity = activity(record.operation);
    // A denial is worth a look; the rest informs.
    let (severity, status) = if record.allowed { (1, 1) } else { (2, 2) };
    let mut event = json!({
        "activity_id": activity,
        "actor": { "user": { "name": record.who } },
        "api": { "operation": record.operation, "service": { "name": "polydev.runtime.v1" } },
        "category_uid": CATEGORY,
        "class_uid": CLASS,
        "metadata": {
            "product": {
                "name": "polydev-shim",
                "vendor_name": "polydev",
                "version": env!("CARGO_PKG_VERSION"),
            },
            "sequence": line.number,
            "uid": line.number.to_string(),
            "version": "1.3.0",
        },
        "severity_id": severity,
        "src_endpoint": endpoint(&record.from),
        "status_id": status,
        "time": millis(&line.time),
        "type_uid": CLASS * 100 + activity,
    });
    if let Some(why) = &record.why {
        event["status_detail"] = json!(why);
    }
    if let Some(policy) = &record.policy {
        event["unmapped"] = json!({ "policy": policy });
        if let Some(tool) = &record.tool {
            event["unmapped"]["tool"] = json!(tool);
        }
        if let Some(approval) = &record.approval {
            event["unmapped"]["approval"] = json!(approval);
        }
    }
    if let Some(resource) = resource(record) {
        event["resources"] = json!([resource]);
    }
    Some(event)
}

/// Create, read, update, delete, or other.
fn activity(operation: Operation) -> u32 {
    match operation {
        Operation::Start | Operation::Lease => 1,
        Operation::Look
        | Operation::See
        | Operation::Attach
        | Operation::List
        | Operation::SeeApprovals
        | Operation::ListCredentials => 2,
        Operation::Scale
        | Operation::Drain
        | Operation::Resume
        | Operation::PutCredential
        | Operation::RotateCredentials => 3,
        Operation::Cancel
        | Operation::Release
        | Operation::PruneImages
        | Operation::DeleteCredential => 4,
        Operation::Call
        | Operation::Inject
        | Operation::Unbound
        | Operation::Tool
        | Operation::RequestApproval
        | Operation::Approve
        | Operation::Deny => 99,
    }
}

fn endpoint(from: &str) -> Value {
    match from.parse::<SocketAddr>() {
        Ok(address) => json!({ "ip": address.ip(), "port": address.port() }),
        Err(_) => json!({ "name": from }),
    }
}

/// The run if there is one, or all that the user has, or the pool.
fn resource(record: &Record) -> Option<Value> {
    let (user_id, provider) = (&record.user_id, &record.provider);
    let name = user_id.as_ref().or(provider.as_ref());
    let run = record.run_id.as_ref().map(|run_id| ("uid", json!(run_id)));
    let known = [
        run.or(name.map(|name| ("name", json!(name))))?,
        ("owner", json!({ "uid": user_id })),
        ("group", json!({ "name": provider })),
    ];
    let known = known.into_iter().filter(|(_, value)| match value {
        Value::Object(object) => object.values().all(|value| !value.is_null()),
        _ => true,
    });
    let known = known.map(|(name, value)| (name.to_owned(), value));
    Some(Value::Object(known.collect()))
}

/// Since 1970.
fn millis(time: &str) -> i64 {
    let time: Timestamp = time.parse().unwrap_or_default();
    time.seconds * 1000 + i64::from(time.nanos) / 1_000_000
}
