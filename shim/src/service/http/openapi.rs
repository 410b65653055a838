//! The OpenAPI document. It is made from the protocol's descriptors and comments, so that it
//! matches what is served.

use std::collections::{BTreeMap, BTreeSet};

use prost_reflect::{EnumDescriptor, FieldDescriptor, FileDescriptor, Kind, MessageDescriptor};
use serde_json::{Map, Value, json};

use super::{
    json::descriptor,
    operation::{Answer, Operation, Parameter},
};

/// The document of these operations.
pub(super) fn describe(operations: &[Operation]) -> Value {
    let mut schemas = Schemas::default();
    let mut paths: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
    for operation in operations {
        let described = operation.describe(&mut schemas);
        let path = paths.entry(operation.path).or_default();
        path.insert(operation.method.name().into(), described);
    }
    // Events refer to this message.
    schemas.reference(&descriptor("RunEvent"));
    schemas.made.insert("Problem".into(), problem());
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "polydev",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Runs users' commands in warm, isolated containers. The messages are those of the gRPC API polydev.runtime.v1, in protobuf's JSON form: 64-bit numbers are strings, bytes are base64, durations are seconds with an `s`.",
        },
        "paths": paths,
        "components": { "schemas": schemas.made },
    })
}

/// One server-sent event.
fn event() -> Value {
    let names = descriptor("RunEvent");
    let names = names.fields().map(|field| field.name().to_owned());
    let names: Vec<_> = names.chain(["problem".to_owned()]).collect();
    json!({
        "type": "object",
        "description": "One event. Its data is JSON: the field of RunEvent with the event's name, or a Problem, which ends the stream.",
        "required": ["event", "data"],
        "properties": {
            "event": { "type": "string", "enum": names },
            "data": { "type": "string", "contentMediaType": "application/json" },
            "id": { "type": "string", "description": "The value to send as Last-Event-ID." },
        },
    })
}

fn problem() -> Value {
    json!({
        "type": "object",
        "required": ["error"],
        "properties": { "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": { "type": "string", "description": "The name of the gRPC code." },
                "message": { "type": "string", "description": "Text for people." },
                "reason": { "type": "string", "description": "The stable reason, more exact than the code." },
                "fields": {
                    "type": "array", "items": { "type": "string" },
                    "description": "The fields that are not valid.",
                },
                "retry_after_seconds": {
                    "type": "integer",
                    "description": "The same call may succeed after this time, and is safe to repeat.",
                },
            },
        } },
    })
}

impl Operation {
    fn describe(&self, schemas: &mut Schemas) -> Value {
        let in_path = self.path.split(['{', '}']).skip(1).step_by(2).map(|name| {
            json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } })
        });
        let in_query = self.query.iter().map(|(name, kind)| {
            let schema = match kind {
                Parameter::Needed | Parameter::Text => json!({ "type": "string" }),
                Parameter::Flag => json!({ "type": "boolean" }),
                Parameter::Of(message) => {
                    let field = descriptor(message).get_field_by_name(name);
                    schemas.field(&field.expect("a query has names of the protocol"))
                }
            };
            let required = matches!(kind, Parameter::Needed);
            json!({ "name": name, "in": "query", "required": required, "schema": schema })
        });
        let in_header = matches!(self.answer, Answer::Events(None)).then(|| {
            json!({
                "name": "Last-Event-ID", "in": "header", "required": false,
                "description": "The id of the last event that the caller has. The stream continues after this event.",
                "schema": { "type": "string", "pattern": "^[0-9]{1,18}([.][0-9]{1,18}){2}([.]end)?$" },
            })
        });
        let parameters: Vec<_> = in_path.chain(in_query).chain(in_header).collect();
        let json_of = |schema: Value| json!({ "application/json": { "schema": schema } });
        let content = match &self.answer {
            Answer::Message(name) => json_of(schemas.reference(&descriptor(name))),
            Answer::Document => json_of(json!({ "type": "object" })),
            Answer::Events(detached) => {
                let mut content = match detached {
                    Some(name) => json_of(schemas.reference(&descriptor(name))),
                    None => json!({}),
                };
                content["text/event-stream"] = json!({ "schema": event() });
                content
            }
        };
        let mut described = json!({
            "operationId": self.name,
            "summary": self.summary,
            "parameters": parameters,
            "responses": {
                "200": { "description": "The result, or the beginning of the stream.", "content": content },
                "default": {
                    "description": "The error.",
                    "content": json_of(json!({ "$ref": "#/components/schemas/Problem" })),
                },
            },
        });
        if let Answer::Events(None) = self.answer {
            described["responses"]["204"] =
                json!({ "description": "The caller already has the last event." });
        }
        if let Some(name) = self.body {
            let body = json_of(schemas.reference(&descriptor(name)));
            described["requestBody"] = json!({ "required": true, "content": body });
        }
        described
    }
}

/// The schemas of all messages that are referred to.
#[derive(Default)]
struct Schemas {
    made: Map<String, Value>,
    begun: BTreeSet<String>,
}

impl Schemas {
    fn reference(&mut self, message: &MessageDescriptor) -> Value {
        let name = message.name().to_owned();
        if self.begun.insert(name.clone()) {
            let schema = self.message(message);
            self.made.insert(name.clone(), schema);
        }
        json!({ "$ref": format!("#/components/schemas/{name}") })
    }

    fn message(&mut self, message: &MessageDescriptor) -> Value {
        let fields = message.fields().filter(|field| !is_grpcs(field));
        let properties = fields.map(|field| {
            let mut schema = self.field(&field);
            let words = comment(&field.parent_message().parent_file(), field.path());
            if let (Some(words), Some(schema)) = (words, schema.as_object_mut()) {
                schema.insert("description".into(), words.into());
            }
            (field.name().to_owned(), schema)
        });
        let properties: Map<String, Value> = properties.collect();
        let words = comment(&message.parent_file(), message.path());
        json!({
            "type": "object",
            "description": words.unwrap_or_default(),
            "properties": properties,
            "additionalProperties": false,
        })
    }

    fn field(&mut self, field: &FieldDescriptor) -> Value {
        if let (true, Kind::Message(entry)) = (field.is_map(), field.kind()) {
            let value = self.kind(&entry.map_entry_value_field().kind());
            return json!({ "type": "object", "additionalProperties": value });
        }
        let one = self.kind(&field.kind());
        match field.is_list() {
            true => json!({ "type": "array", "items": one }),
            false => one,
        }
    }

    fn kind(&mut self, kind: &Kind) -> Value {
        match kind {
            Kind::Bool => json!({ "type": "boolean" }),
            Kind::String => json!({ "type": "string" }),
            Kind::Bytes => json!({ "type": "string", "contentEncoding": "base64" }),
            Kind::Enum(names) => json!({ "type": "string", "enum": values(names) }),
            Kind::Uint32 | Kind::Fixed32 => {
                json!({ "type": "integer", "minimum": 0, "maximum": u32::MAX })
            }
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
                json!({ "type": "integer", "minimum": i32::MIN, "maximum": i32::MAX })
            }
            Kind::Uint64 | Kind::Fixed64 => {
                json!({ "type": "string", "format": "uint64", "pattern": "^[0-9]{1,19}$" })
            }
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
                json!({ "type": "string", "format": "int64", "pattern": "^-?[0-9]{1,18}$" })
            }
            Kind::Double | Kind::Float => json!({ "type": "number" }),
            Kind::Message(message) => match message.full_name() {
                "google.protobuf.Timestamp" => json!({ "type": "string", "format": "date-time" }),
                "google.protobuf.Duration" => {
                    json!({ "type": "string", "pattern": "^[0-9]{1,9}([.][0-9]{1,9})?s$" })
                }
                _ => self.reference(message),
            },
        }
    }
}

/// Whether only gRPC has the field: over HTTP, nothing can follow a run's start.
fn is_grpcs(field: &FieldDescriptor) -> bool {
    matches!(
        field.full_name().trim_start_matches("polydev.runtime.v1."),
        "RunStart.stdin" | "InputFile.size"
    )
}

fn values(names: &EnumDescriptor) -> Vec<String> {
    names
        .values()
        .map(|value| value.name().to_owned())
        .collect()
}

/// The comment in the protocol.
fn comment(file: &FileDescriptor, path: &[i32]) -> Option<String> {
    let source = file.file_descriptor_proto().source_code_info.as_ref()?;
    let location = source
        .location
        .iter()
        .find(|location| location.path == path)?;
    let words = location.leading_comments().split_whitespace();
    Some(words.collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::http::routes::OPERATIONS;

    #[test]
    fn every_reference_leads_somewhere_and_every_field_is_described() {
        let document = describe(OPERATIONS);
        let schemas = document["components"]["schemas"].as_object().unwrap();
        let text = document.to_string();
        for reference in text.split("#/components/schemas/").skip(1) {
            let name = reference.split('"').next().unwrap();
            assert!(schemas.contains_key(name), "{name}");
        }
        for (name, schema) in schemas.iter().filter(|(name, _)| *name != "Problem") {
            let properties = schema["properties"].as_object().unwrap();
            for (field, schema) in properties {
                let described = schema.get("description").is_some();
                assert!(described, "{name}.{field} has no words");
            }
        }
    }
}
