//! The call of one run, in both directions: the caller's input and the run's events.

use std::{sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use polydev_proto::node::{Attached, RunEvent, RunInput, run_event, run_input};
use tonic::{Status, Streaming};

use super::encode_event;
use crate::run::{Input, Run, follow::Follower};

const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// The first message; a shim must send it at once.
pub(super) async fn first<T>(requests: &mut Streaming<T>) -> Result<Option<T>, Status> {
    let first = tokio::time::timeout(FIRST_MESSAGE_TIMEOUT, requests.message()).await;
    first.map_err(|_| Status::deadline_exceeded("no first message arrived within 10 s"))?
}

/// The first event of every call.
pub(super) fn attached(run: &Run, stdin_offset: u64) -> RunEvent {
    let attached = Attached {
        slot_id: run.claimed.slot_id.clone().into(),
        generation: run.claimed.generation.0,
        stdin_offset,
        on_demand: run.claimed.on_demand,
        files_bytes: run.claimed.files_bytes,
    };
    RunEvent {
        event: Some(run_event::Event::Attached(attached)),
    }
}

/// Events for a run's caller, as fast as the caller reads them.
pub(super) fn events(follower: Follower) -> impl Stream<Item = Result<RunEvent, Status>> + Send {
    stream::unfold(follower, |mut follower| async move {
        let event = follower.next().await?;
        Some((encode_event(event), follower))
    })
}

/// Forwards input until the caller closes its side or disconnects, or the run ends. A
/// disconnected caller may come back, so its absence closes nothing.
pub(super) async fn forward(mut inputs: stream::BoxStream<'static, RunInput>, run: Arc<Run>) {
    loop {
        let input = tokio::select! {
            input = inputs.next() => input,
            () = run.over() => return,
        };
        let input = match input.map(|input| input.input) {
            Some(Some(run_input::Input::Stdin(stdin))) => Input::Stdin {
                offset: stdin.offset,
                data: stdin.data,
            },
            Some(Some(run_input::Input::CloseStdin(_))) => Input::CloseStdin,
            Some(Some(run_input::Input::Signal(signal))) => Input::Signal(signal.number),
            Some(Some(run_input::Input::Resize(size))) => Input::Resize(size),
            // Unknown: from a newer shim.
            Some(None) => continue,
            None => return,
        };
        if !run.input(input).await {
            return;
        }
    }
}
