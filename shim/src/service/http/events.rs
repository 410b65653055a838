//! A run's events as server-sent events. The id of an event is how much of stdout, stderr and
//! artifacts a caller has that has this event; a caller that comes back gives it as
//! `Last-Event-ID`.

use std::convert::Infallible;

use axum::response::{
    IntoResponse, Response,
    sse::{KeepAlive, Sse},
};
use futures_util::{Stream, StreamExt, future, stream};
use polydev_proto::runtime::{RunEvent, run_event::Event};
use tonic::Status;

use super::{error::Problem, json};

/// After the id of a run's last event.
const END: &str = ".end";

/// Whether the caller has the run's last event.
pub(super) fn is_last(id: &[u8]) -> bool {
    id.ends_with(END.as_bytes())
}

/// The offsets in the id of an event.
pub(super) fn offsets(id: &str) -> Result<[u64; 3], Status> {
    let parts: Result<Vec<u64>, _> = id.split('.').map(str::parse).collect();
    let parts = parts
        .ok()
        .and_then(|parts| <[u64; 3]>::try_from(parts).ok());
    parts.ok_or_else(|| {
        Status::invalid_argument(format!(
            "`Last-Event-ID` is `{id}`, allowed is the id of an event"
        ))
    })
}

/// The events as they come. What goes wrong before the first has a status of its own.
pub(super) async fn answer(
    events: impl Stream<Item = Result<RunEvent, Status>> + Send + 'static,
    offsets: [u64; 3],
) -> Result<Response, Status> {
    let mut events = Box::pin(events);
    let first = events.next().await.transpose()?;
    let events = stream::iter(first.map(Ok)).chain(events);
    let events = events.scan(offsets, |offsets, event| {
        let event = match event {
            Ok(event) => {
                advance(offsets, &event);
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

/// Moves the offsets of stdout, stderr and artifacts on by an event.
fn advance(offsets: &mut [u64; 3], event: &RunEvent) {
    let (stream, end) = match &event.event {
        Some(Event::Stdout(output)) => (0, output.offset + output.data.len() as u64),
        Some(Event::Stderr(output)) => (1, output.offset + output.data.len() as u64),
        Some(Event::ArtifactData(output)) => (2, output.offset + output.data.len() as u64),
        Some(Event::Lost(lost)) => match lost.stream {
            stream @ 1..=3 => (usize::try_from(stream - 1).unwrap_or(0), lost.to),
            _ => return,
        },
        _ => return,
    };
    offsets[stream] = end;
}
