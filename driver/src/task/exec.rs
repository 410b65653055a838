//! Runs another command in a task's container, for `nomad alloc exec` and script checks.

use std::time::Duration;

use bytes::Bytes;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

use crate::{
    docker::{self, Docker, Exec, ExecInput, ExecOutput, Piece},
    process::{Held, is_of_container},
};

/// How often to check whether a quiet command has ended.
const STATE_INTERVAL: Duration = Duration::from_millis(100);
/// How long after the last output to wait for more, once the command has ended. A
/// background process may keep the streams open forever.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Upper bound for that wait.
const MAX_DRAIN_TIME: Duration = Duration::from_secs(5);
/// Nomad keeps 4 KiB of a script check's output.
const MAX_OUTPUT: usize = 4 << 10;

/// A message from the caller.
#[derive(Debug)]
pub enum Input {
    Stdin(Bytes),
    CloseStdin,
    Resize { height: u16, width: u16 },
}

/// An event for the caller.
#[derive(Debug)]
pub enum Event {
    Output(Piece),
    /// The last event.
    Exited(i32),
}

/// The result of a short command.
#[derive(Debug, Default)]
pub struct Outcome {
    pub output: Vec<u8>,
    pub exit_code: i32,
}

/// Runs a command to its end, or kills it after `limit`.
///
/// # Errors
/// [`docker::Error`]; `TimedOut` if the command was killed.
pub async fn run(
    docker: &Docker,
    container: &str,
    command: Vec<String>,
    limit: Duration,
) -> Result<Outcome, docker::Error> {
    let mut outcome = Outcome::default();
    let mut started = None;
    let done = async {
        let (exec, mut output, mut input) = docker.exec(container, command, false).await?;
        let exec = &*started.insert(exec);
        input.close().await;
        let mut ended = None;
        loop {
            match step(exec, &mut output, &mut ended).await? {
                Event::Output(Piece::Stdout(data) | Piece::Stderr(data)) => {
                    let room = MAX_OUTPUT.saturating_sub(outcome.output.len());
                    outcome
                        .output
                        .extend_from_slice(&data[..room.min(data.len())]);
                }
                Event::Exited(exit_code) => {
                    outcome.exit_code = exit_code;
                    return Ok(());
                }
            }
        }
    };
    match timeout(limit, done).await {
        Ok(Ok(())) => Ok(outcome),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            if let Some(exec) = &started {
                kill(exec, container).await;
            }
            Err(docker::Error::TimedOut {
                operation: "run a command in the task".into(),
                after: limit,
            })
        }
    }
}

/// Serves a started command until it ends. If nobody listens any longer, the command is
/// killed. The last event is its exit, or why dockerd could not report it.
pub async fn serve(
    container: &str,
    (exec, mut output, mut input): (Exec, ExecOutput, ExecInput),
    mut received: mpsc::Receiver<Input>,
    events: mpsc::Sender<Result<Event, docker::Error>>,
) {
    // Separate from the output: a command may write before it reads more.
    let feed = async {
        let mut is_read = true;
        while let Some(step) = received.recv().await {
            match step {
                Input::Stdin(data) => is_read = is_read && input.write(&data).await,
                Input::CloseStdin => input.close().await,
                Input::Resize { height, width } => exec.resize(height, width).await,
            }
        }
    };
    let drain = async {
        let mut ended = None;
        loop {
            let event = step(&exec, &mut output, &mut ended).await;
            let is_last = !matches!(event, Ok(Event::Output(_)));
            if events.send(event).await.is_err() {
                return false;
            }
            if is_last {
                return true;
            }
        }
    };
    let is_done = tokio::select! {
        is_done = drain => is_done,
        // The caller has disconnected, so its command ends too.
        () = feed => false,
        () = events.closed() => false,
    };
    if !is_done {
        kill(&exec, container).await;
    }
}

/// The command's next event; `ended` holds when the command ended.
///
/// # Cancel safety
/// Loses nothing.
async fn step(
    exec: &Exec,
    output: &mut ExecOutput,
    ended: &mut Option<Instant>,
) -> Result<Event, docker::Error> {
    loop {
        let wait = if ended.is_some() {
            DRAIN_TIMEOUT
        } else {
            STATE_INTERVAL
        };
        let next = timeout(wait, output.next()).await;
        match (next, &ended) {
            (Ok(Some(piece)), Some(since)) if since.elapsed() < MAX_DRAIN_TIME => {
                return piece.map(Event::Output);
            }
            (Ok(Some(piece)), None) => return piece.map(Event::Output),
            (Ok(None), _) | (_, Some(_)) => return Ok(Event::Exited(exit_code(exec).await?)),
            (Err(_), None) => *ended = exec.exit_code().await?.map(|_| Instant::now()),
        }
    }
}

/// The streams may end slightly before dockerd knows the exit status.
async fn exit_code(exec: &Exec) -> Result<i32, docker::Error> {
    let begin = Instant::now();
    loop {
        match exec.exit_code().await? {
            Some(code) => return Ok(clamp(code)),
            // The command closed its streams but still runs.
            None if begin.elapsed() < STATE_INTERVAL => sleep(Duration::from_millis(2)).await,
            None => sleep(STATE_INTERVAL).await,
        }
    }
}

fn clamp(code: i64) -> i32 {
    i32::try_from(code).unwrap_or(i32::MAX)
}

/// dockerd's pid may be out of date, so a process outside the container is not killed.
async fn kill(exec: &Exec, container: &str) {
    if let Some(held) = exec
        .pid()
        .await
        .filter(|pid| is_of_container(*pid, container))
        .and_then(|pid| Held::open(pid).ok())
    {
        held.kill();
    }
}
