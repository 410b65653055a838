//! Nomad's stream of an exec, turned into a task's.

use futures_util::{Stream, StreamExt};
use polydev_proto::driver::{
    ExecTaskStreamingIoOperation as Operation, ExecTaskStreamingRequest as Request,
    ExecTaskStreamingResponse as Response, ExitResult, exec_task_streaming_request::TerminalSize,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Status, Streaming};

use super::Error;
use crate::{
    docker::{self, Exec, ExecInput, ExecOutput, Piece},
    task::exec::{self, Event, Input},
};

/// Pieces of at most 64 KiB on their way in either direction.
const MAX_WAITING: usize = 8;

/// Serves a command that was started. What the caller sends is read until it ends or
/// breaks, which ends the command; what the command writes is sent to its last byte.
pub(super) fn serve(
    background: &TaskTracker,
    container: String,
    exec: (Exec, ExecOutput, ExecInput),
    mut requests: Streaming<Request>,
) -> impl Stream<Item = Result<Response, Status>> + Send + 'static {
    let (input, inputs) = mpsc::channel(MAX_WAITING);
    let (events, results) = mpsc::channel(MAX_WAITING);
    background.spawn(async move { exec::serve(&container, exec, inputs, events).await });
    background.spawn(async move {
        while let Ok(Some(request)) = requests.message().await {
            for step in decode(request) {
                if input.send(step).await.is_err() {
                    return;
                }
            }
        }
    });
    ReceiverStream::new(results).flat_map(|result| futures_util::stream::iter(encode(result)))
}

/// A message with nothing in it is a heartbeat.
fn decode(request: Request) -> Vec<Input> {
    let mut steps = Vec::new();
    if let Some(TerminalSize { height, width }) = request.tty_size {
        let side = |length| u16::try_from(length).unwrap_or(u16::MAX);
        let (height, width) = (side(height), side(width));
        steps.push(Input::Resize { height, width });
    }
    if let Some(Operation { data, close }) = request.stdin {
        if !data.is_empty() {
            steps.push(Input::Stdin(data.into()));
        }
        if close {
            steps.push(Input::CloseStdin);
        }
    }
    steps
}

fn encode(result: Result<Event, docker::Error>) -> Vec<Result<Response, Status>> {
    let output = |data: bytes::Bytes| {
        Some(Operation {
            data: data.into(),
            close: false,
        })
    };
    let closed = || {
        Some(Operation {
            data: Default::default(),
            close: true,
        })
    };
    match result {
        Ok(Event::Output(Piece::Stdout(data))) => vec![Ok(Response {
            stdout: output(data),
            ..Default::default()
        })],
        Ok(Event::Output(Piece::Stderr(data))) => vec![Ok(Response {
            stderr: output(data),
            ..Default::default()
        })],
        Ok(Event::Exited(exit_code)) => vec![
            Ok(Response {
                stdout: closed(),
                ..Default::default()
            }),
            Ok(Response {
                stderr: closed(),
                ..Default::default()
            }),
            Ok(Response {
                exited: true,
                result: Some(ExitResult {
                    exit_code,
                    ..Default::default()
                }),
                ..Default::default()
            }),
        ],
        Err(error) => vec![Err(Error::Exec(error).into())],
    }
}
