//! A run's events as server-sent events. The id of an event says how many bytes of stdout, stderr
//! and artifacts a caller has after this event. A caller that reconnects sends the id of their
//! last event as `Last-Event-ID`.

use std::convert::Infallible;

use axum::response::{
    IntoResponse, Response,
    sse::{KeepAlive, Sse},
};
use futures_util::{Stream, StreamExt, future, stream};
use polydev_proto::{
    runtime::{RunEvent, run_event::Event},
    stream::{PerStream, Stream as Kind},
};
use tonic::Status;

use super::{error::Problem, json};

/// The suffix of the id of a run's last event.
const END: &str = ".end";

/// Whether the caller has the run's last event.
pub(super) fn is_last(id: &[u8]) -> bool {
    id.ends_with(END.as_bytes())
}

/// The offsets in the id of an event.
pub(super) fn offsets(id: &str) -> Result<PerStream<u64>, Status> {
    let parts: Result<Vec<u64>, _> = id.split('.').map(str::parse).collect();
    let offsets = match parts.as_deref() {
        Ok(&[stdout, stderr, artifacts, events]) => Some([stdout, stderr, artifacts, events]),
        // Of an earlier shim.
        Ok(&[stdout, stderr, artifacts]) => Some([stdout, stderr, artifacts, 0]),
        _ => None,
    };
    offsets.map(PerStream::from).ok_or_else(|| {
        Status::invalid_argument(format!(
            "`Last-Event-ID` is `{id}`; must be the id of an event"
        ))
    })
}

/// The events as they come. An error before the first event becomes the status of the answer.
pub(super) async fn answer(
    events: impl Stream<Item = Result<RunEvent, Status>> + Send + 'static,
    offsets: PerStream<u64>,
) -> Result<Response, Status> {
    let mut events = Box::pin(events);
    let first = events.next().await.transpose()?;
    let events = stream::iter(first.map(Ok)).chain(events);
    let events = events.scan(offsets, |offsets, event| {
        let event = match event {
            Ok(event) => {
                advance(offsets, &event);
                let offsets = offsets.into_array();
                let mut id = offsets.map(|offset| offset.to_string()).join(".");
                if let Some(Event::Exited(_)) = event.event {
                    id.push_str(END);
                }
                json::event(&event).id(id)
            }
            Err(status) => Problem::from(status).event(),
        };
        future::ready(Some(Ok::<_, Infallible>(event)))
    });
    Ok(Sse::new(events)
        .keep_alive(KeepAlive::default())
        .into_response())
}

/// Advances the offsets of the streams by one event.
fn advance(offsets: &mut PerStream<u64>, event: &RunEvent) {
    let (stream, end) = match &event.event {
        Some(Event::Stdout(output)) => (Kind::Stdout, output.offset + output.data.len() as u64),
        Some(Event::Stderr(output)) => (Kind::Stderr, output.offset + output.data.len() as u64),
        Some(Event::ArtifactData(output)) => {
            (Kind::Artifacts, output.offset + output.data.len() as u64)
        }
        Some(Event::AgentEvents(told)) => (Kind::Events, told.end_offset),
        Some(Event::Lost(lost)) => match Kind::of_number(lost.stream) {
            Some(stream) => (stream, lost.to),
            None => return,
        },
        _ => return,
    };
    offsets[stream] = end;
}
