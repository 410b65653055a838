//! Connects Nomad's exec stream to a command in a task.

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

/// Most messages in flight in each direction, of at most 64 KiB each.
const MAX_WAITING: usize = 8;

/// Serves a started command. The caller's messages are read until the stream ends or
/// breaks, which ends the command. All of the command's output is sent.
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

/// An empty message is a heartbeat.
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
