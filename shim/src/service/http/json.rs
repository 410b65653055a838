//! Messages in protobuf's JSON form, with the names of the fields as they are in the protocol;
//! those in lowerCamelCase are taken too. What is not understood is refused.

use std::{collections::BTreeMap, sync::LazyLock};

use axum::{
    Json,
    response::{IntoResponse, Response, sse},
};
use polydev_proto::{
    DESCRIPTORS,
    runtime::{
        AllocateRequest, AllocateResponse, CancelRunRequest, CancelRunResponse,
        GetClusterStatusResponse, GetPoolResponse, GetRunResponse, ListPoolsResponse,
        ListRunsRequest, ListRunsResponse, ReleaseRequest, ReleaseResponse, RunEvent,
        SubmitJobRequest, SubmitJobResponse, run_event::Event,
    },
};
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, Kind, MessageDescriptor, SerializeOptions,
};
use serde_json::Value;
use tonic::Status;

use super::error::Problem;

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
    AllocateRequest AllocateResponse CancelRunRequest CancelRunResponse GetClusterStatusResponse
    GetPoolResponse GetRunResponse ListPoolsResponse ListRunsRequest ListRunsResponse
    ReleaseRequest ReleaseResponse RunEvent SubmitJobRequest SubmitJobResponse
}

/// The words of a query.
pub(super) type Fields = BTreeMap<String, String>;

pub(super) fn descriptor(name: &str) -> MessageDescriptor {
    let name = format!("polydev.runtime.v1.{name}");
    let found = POOL.get_message_by_name(&name);
    found.expect("every message that is named here is in the protocol")
}

pub(super) fn from_slice<M: Message>(bytes: &[u8]) -> Result<M, Problem> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let message =
        DynamicMessage::deserialize_with_options(descriptor(M::NAME), &mut json, &options);
    let message = message.and_then(|message| json.end().map(|()| message));
    let message = message.map_err(|error| refused(&error.to_string()))?;
    message
        .transcode_to()
        .map_err(|error| refused(&error.to_string()))
}

/// From a query, in which lists are separated by commas.
pub(super) fn from_fields<M: Message>(fields: Fields) -> Result<M, Problem> {
    let descriptor = descriptor(M::NAME);
    let value = |(name, text): (String, String)| {
        let field = descriptor.get_field_by_name(&name);
        let value = match field {
            Some(field) if field.is_list() => text.split(',').map(Value::from).collect(),
            Some(field) if matches!(field.kind(), Kind::Uint32) => match text.parse::<u32>() {
                Ok(number) => number.into(),
                Err(_) => text.into(),
            },
            // That there is no such field is found out below.
            Some(_) | None => text.into(),
        };
        (name, value)
    };
    let json: serde_json::Map<String, Value> = fields.into_iter().map(value).collect();
    from_slice(Value::Object(json).to_string().as_bytes())
}

/// What of the body is quoted may be long.
fn refused(words: &str) -> Problem {
    let words = &words[..words.floor_char_boundary(500)];
    Status::invalid_argument(format!("the request is not understood: {words}")).into()
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

/// An event by its name, with what it says.
pub(super) fn event(event: &RunEvent) -> sse::Event {
    let name = match &event.event {
        Some(Event::Queued(_)) => "queued",
        Some(Event::Accepted(_)) => "accepted",
        Some(Event::Started(_)) => "started",
        Some(Event::Stdout(_)) => "stdout",
        Some(Event::Stderr(_)) => "stderr",
        Some(Event::Lost(_)) => "lost",
        Some(Event::Artifacts(_)) => "artifacts",
        Some(Event::ArtifactData(_)) => "artifact_data",
        Some(Event::Exited(_)) => "exited",
        None => "unknown",
    };
    let mut value = to_value(event);
    let data = value.get_mut(name).map(Value::take).unwrap_or_default();
    sse::Event::default().event(name).data(data.to_string())
}
