//! The call of one run, in both directions: what its caller sends, and what it is sent.

use std::{sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use polydev_proto::node::{Attached, RunEvent, RunInput, run_event, run_input};
use tonic::{Status, Streaming};

use super::encode_event;
use crate::run::{Input, Run, follow::Follower};

const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// A shim says what it wants at once, or it is none.
pub(super) async fn first<T>(requests: &mut Streaming<T>) -> Result<Option<T>, Status> {
    let first = tokio::time::timeout(FIRST_MESSAGE_TIMEOUT, requests.message()).await;
    first.map_err(|_| Status::deadline_exceeded("no first message came in 10 s"))?
}

/// The first event of every call.
pub(super) fn attached(run: &Run, stdin_offset: u64) -> RunEvent {
    let attached = Attached {
        slot_id: run.claimed.slot_id.clone(),
        generation: run.claimed.generation,
        stdin_offset,
        on_demand: run.claimed.on_demand,
        files_bytes: run.claimed.files_bytes,
    };
    RunEvent {
        event: Some(run_event::Event::Attached(attached)),
    }
}

/// What a caller of a run is told, as it asks for it.
pub(super) fn events(follower: Follower) -> impl Stream<Item = Result<RunEvent, Status>> + Send {
    stream::unfold(follower, |mut follower| async move {
        let event = follower.next().await?;
        Some((encode_event(event), follower))
    })
}

/// Until the caller closes its side or goes away, or the run ends. That a caller is gone
/// closes nothing: it may come back.
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
            // A message of a newer shim.
            Some(None) => continue,
            None => return,
        };
        if !run.input(input).await {
            return;
        }
    }
}
