//! Messages in protobuf's JSON form, with the field names of the protocol. Requests may also use
//! the names in lowerCamelCase. Unknown fields are refused.

use std::{fmt, sync::LazyLock};

use axum::{
    Json,
    response::{IntoResponse, Response, sse},
};
use polydev_proto::{
    DESCRIPTORS,
    runtime::{
        AllocateRequest, AllocateResponse, ApproveRequest, ApproveResponse, CancelRunRequest,
        CancelRunResponse, DenyRequest, DenyResponse, GetApprovalResponse,
        GetClusterStatusResponse, GetPoolResponse, GetRunResponse, ListApprovalsRequest,
        ListApprovalsResponse, ListPoolsResponse, ListRunsRequest, ListRunsResponse,
        ReleaseRequest, ReleaseResponse, RunEvent, RunScriptRequest, RunScriptResponse,
        SubmitJobRequest, SubmitJobResponse, run_event::Event,
    },
};
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, FieldDescriptor, MessageDescriptor,
    SerializeOptions,
};
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Value, error::Category};
use serde_path_to_error::Segment;
use tonic::Status;

use super::error::Problem;
use crate::service::MAX_MESSAGE;

/// Every message of the protocols.
pub(super) static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(DESCRIPTORS).expect("the compiler's own output can be read")
});

/// A message of `polydev.runtime.v1` that has a JSON form here.
pub(super) trait Message: prost::Message + Default {
    const NAME: &str;
}

macro_rules! messages {
    ($($message:ident)*) => {
        $(impl Message for $message {
            const NAME: &str = stringify!($message);
        })*
    };
}

messages! {
    ApproveRequest ApproveResponse DenyRequest DenyResponse GetApprovalResponse
    ListApprovalsRequest ListApprovalsResponse
    AllocateRequest AllocateResponse CancelRunRequest CancelRunResponse GetClusterStatusResponse
    GetPoolResponse GetRunResponse ListPoolsResponse ListRunsRequest ListRunsResponse
    ReleaseRequest ReleaseResponse RunEvent RunScriptRequest RunScriptResponse SubmitJobRequest SubmitJobResponse
}

/// The names and values of a query.
pub(super) type Fields = Vec<(String, String)>;

pub(super) fn descriptor(name: &str) -> MessageDescriptor {
    let name = format!("polydev.runtime.v1.{name}");
    let found = POOL.get_message_by_name(&name);
    found.expect("every message that is named here is in the protocol")
}

/// # Errors
/// [`Problem`] with the place of the error. It quotes no value, because a value may be a secret.
pub(super) fn from_slice<M: Message>(bytes: &[u8]) -> Result<M, Problem> {
    let mut count = Count(0);
    let mut json = serde_json::Deserializer::from_slice(bytes);
    // Decoded values are much larger than their JSON, so their number needs a limit.
    let counted = count.deserialize(&mut json).and_then(|()| json.end());
    counted.map_err(|error| refused("", &error))?;

    let mut json = serde_json::Deserializer::from_slice(bytes);
    let mut track = serde_path_to_error::Track::new();
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let tracked = serde_path_to_error::Deserializer::new(&mut json, &mut track);
    let message = DynamicMessage::deserialize_with_options(descriptor(M::NAME), tracked, &options);
    let message = message.map_err(|error| refused(&known(&track.path()), &error))?;
    let message: M = message.transcode_to().map_err(|_| {
        let words = "the request is not valid";
        Problem::from(Status::invalid_argument(words))
    })?;
    match message.encoded_len() {
        length if length > MAX_MESSAGE => Err(Problem::too_large(length, MAX_MESSAGE)),
        _ => Ok(message),
    }
}

/// The largest number of JSON values in a request.
const MAX_VALUES: usize = 50_000;

/// Counts the values in JSON without keeping them.
struct Count(usize);

impl<'de> DeserializeSeed<'de> for &mut Count {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        self.0 += 1;
        if self.0 > MAX_VALUES {
            return Err(D::Error::custom("too many values"));
        }
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut Count {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<(), A::Error> {
        while values.next_element_seed(&mut *self)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        while entries.next_key::<IgnoredAny>()?.is_some() {
            entries.next_value_seed(&mut *self)?;
        }
        Ok(())
    }
}

/// The place in a message, with no names except those of the protocol.
fn known(path: &serde_path_to_error::Path) -> String {
    let is_known = |name: &str| {
        let mut fields = POOL.all_messages().flat_map(|message| {
            let fields: Vec<_> = message.fields().collect();
            fields
        });
        fields.any(|field| field.name() == name || field.json_name() == name)
    };
    let mut words = String::new();
    for segment in path.iter() {
        match segment {
            Segment::Seq { index } => words.push_str(&format!("[{index}]")),
            Segment::Map { key } if is_known(key) => {
                let dot = if words.is_empty() { "" } else { "." };
                words.push_str(&format!("{dot}{key}"));
            }
            Segment::Map { .. } | Segment::Enum { .. } | Segment::Unknown => {
                words.push_str(".?");
            }
        }
    }
    words
}

fn refused(path: &str, error: &serde_json::Error) -> Problem {
    let (line, column) = (error.line(), error.column());
    let words = match (path, error.classify()) {
        ("", Category::Syntax | Category::Eof | Category::Io) => {
            format!("the body is not valid JSON, at line {line}, column {column}")
        }
        ("", Category::Data) => {
            format!("the request is not valid, at line {line}, column {column}")
        }
        _ => format!(
            "`{path}` is not valid (unknown field or wrong value), at line {line}, column {column}"
        ),
    };
    Status::invalid_argument(words).into()
}

/// The message in a query. Commas separate the items of lists.
pub(super) fn from_fields<M: Message>(fields: Fields) -> Result<M, Problem> {
    let descriptor = descriptor(M::NAME);
    let mut json = serde_json::Map::new();
    for (name, text) in fields {
        let is_list = |field: FieldDescriptor| field.is_list();
        let is_list = descriptor.get_field_by_name(&name).is_some_and(is_list);
        match (json.get_mut(&name), is_list) {
            (Some(Value::Array(list)), true) => list.extend(text.split(',').map(Value::from)),
            (None, true) => drop(json.insert(name, text.split(',').map(Value::from).collect())),
            // `from_slice` refuses unknown fields.
            (None, false) => drop(json.insert(name, text.into())),
            (Some(_), _) => {
                let known = descriptor.get_field_by_name(&name);
                let name = known.map_or_else(|| "?".into(), |field| field.name().to_owned());
                let words = format!("`{name}` is given more than once");
                return Err(Status::invalid_argument(words).into());
            }
        }
    }
    from_slice(Value::Object(json).to_string().as_bytes())
}

fn to_value<M: Message>(message: &M) -> Value {
    let mut dynamic = DynamicMessage::new(descriptor(M::NAME));
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .skip_default_fields(false);
    let written = dynamic
        .transcode_from(message)
        .map_err(|error| error.to_string())
        .and_then(|()| {
            let json = dynamic.serialize_with_options(serde_json::value::Serializer, &options);
            json.map_err(|error| error.to_string())
        });
    written.expect("a message of ours has a JSON form")
}

/// An answer with a message.
pub(super) fn answer<M: Message>(message: &M) -> Response {
    Json(to_value(message)).into_response()
}

/// A server-sent event: the event's name, and its content as data.
pub(super) fn event(event: &RunEvent) -> sse::Event {
    let name = match &event.event {
        Some(Event::Queued(_)) => "queued",
        Some(Event::ApprovalRequired(_)) => "approval_required",
        Some(Event::Accepted(_)) => "accepted",
        Some(Event::Started(_)) => "started",
        Some(Event::Stdout(_)) => "stdout",
        Some(Event::Stderr(_)) => "stderr",
        Some(Event::Lost(_)) => "lost",
        Some(Event::Artifacts(_)) => "artifacts",
        Some(Event::ArtifactData(_)) => "artifact_data",
        Some(Event::ApiErrors(_)) => "api_errors",
        Some(Event::EgressDenied(_)) => "egress_denied",
        Some(Event::AgentEvents(_)) => "agent_events",
        Some(Event::Exited(_)) => "exited",
        None => "unknown",
    };
    let mut value = to_value(event);
    let data = value.get_mut(name).map(Value::take).unwrap_or_default();
    sse::Event::default().event(name).data(data.to_string())
}
