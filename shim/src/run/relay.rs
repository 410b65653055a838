//! Between the caller and the driver, until the command has ended.

use std::time::{Duration, Instant};

use polydev_proto::{
    node::{self, ClaimRequest, ClaimResponse, claim_request, claim_response, ended},
    runtime::{
        Accepted, CloseStdin, ExitReason, Exited, Output, RunRequest, RunResponse, Stage, Started,
        run_request, run_response,
    },
};
use tokio::sync::mpsc;
use tonic::Streaming;
use uuid::Uuid;

use super::{Error, claim::Claimed, request::Invalid};

/// Events that may wait for a caller; each at most 64 KiB. When they are used up the
/// driver is not read any more, and in the end the command waits.
pub const EVENTS: usize = 16;
/// Most stdin in one message, as the API says.
const STDIN_MOST: usize = 64 << 10;

/// Sends a claimed run's events until its end. Dropping the receiving end, or this
/// future, ends the run.
///
/// # Errors
/// [`Error::Lost`] if the driver falls silent before it tells the end.
pub async fn relay(
    received: Instant,
    run_id: Uuid,
    mut claimed: Claimed,
    caller: &mpsc::Sender<Result<RunResponse, Error>>,
) -> Result<(), Error> {
    let mut timeline = Timeline::new(received, claimed.sent);
    let accepted = run_response::Event::Accepted(Accepted {
        run_id: run_id.to_string(),
        slot_id: claimed.slot_id.clone(),
        generation: claimed.generation,
        node_id: claimed.node_id.clone(),
        warm: true,
    });
    if !send(caller, accepted).await {
        return Ok(());
    }
    loop {
        let event = tokio::select! {
            event = claimed.events.message() => event,
            () = caller.closed() => return Ok(()),
        };
        let lost = |reason: String| Error::Lost {
            slot_id: claimed.slot_id.clone(),
            reason,
        };
        let event = match event {
            Ok(Some(ClaimResponse { event: Some(event) })) => event,
            Ok(Some(ClaimResponse { event: None })) => continue,
            Ok(None) => return Err(lost("the driver ended the stream".into())),
            Err(status) => return Err(lost(status.message().to_owned())),
        };
        let event = match event {
            claim_response::Event::Granted(granted) => {
                timeline.driver("granted", granted.granted_after);
                timeline.driver("limits_raised", granted.limits_raised_after);
                continue;
            }
            claim_response::Event::Started(started) => {
                timeline.driver("started", started.after);
                run_response::Event::Started(Started {})
            }
            claim_response::Event::Stdout(output) => {
                run_response::Event::Stdout(encode_output(output))
            }
            claim_response::Event::Stderr(output) => {
                run_response::Event::Stderr(encode_output(output))
            }
            claim_response::Event::Ended(ended) => {
                timeline.driver("first_output", ended.first_output_after);
                timeline.driver("exited", ended.after);
                let exited = encode_end(ended, timeline.stages);
                send(caller, run_response::Event::Exited(exited)).await;
                return Ok(());
            }
        };
        if !send(caller, event).await {
            return Ok(());
        }
    }
}

/// Carries the caller's input to the driver until either side has enough.
///
/// # Errors
/// A sentence on what the caller may not send.
pub async fn forward(
    mut requests: Streaming<RunRequest>,
    inputs: mpsc::Sender<ClaimRequest>,
) -> Result<(), Invalid> {
    loop {
        let request = tokio::select! {
            request = requests.message() => request,
            () = inputs.closed() => return Ok(()),
        };
        let closed = matches!(request, Ok(None));
        let message = match request {
            Ok(Some(RunRequest { message })) => message,
            // The caller has closed its side: the command reads end of file.
            Ok(None) => Some(run_request::Message::CloseStdin(CloseStdin {})),
            Err(_) => return Ok(()),
        };
        let message = match message {
            Some(run_request::Message::Stdin(data)) => {
                if data.len() > STDIN_MOST {
                    return Err(Invalid::Value {
                        field: "stdin",
                        given: format!("{} bytes", data.len()),
                        allowed: "at most 65536 bytes a message",
                    });
                }
                claim_request::Message::Stdin(data)
            }
            Some(run_request::Message::CloseStdin(_)) => {
                claim_request::Message::CloseStdin(node::CloseStdin {})
            }
            Some(run_request::Message::Signal(signal)) => {
                if !(1..=31).contains(&signal.number) {
                    return Err(Invalid::Value {
                        field: "signal.number",
                        given: signal.number.to_string(),
                        allowed: "a signal from 1 to 31",
                    });
                }
                claim_request::Message::Signal(node::Signal {
                    number: signal.number,
                })
            }
            Some(run_request::Message::Start(_)) | None => {
                return Err(Invalid::NotStarted);
            }
        };
        let request = ClaimRequest {
            message: Some(message),
        };
        if inputs.send(request).await.is_err() || closed {
            return Ok(());
        }
    }
}

/// False when the caller is gone.
async fn send(
    caller: &mpsc::Sender<Result<RunResponse, Error>>,
    event: run_response::Event,
) -> bool {
    caller
        .send(Ok(RunResponse { event: Some(event) }))
        .await
        .is_ok()
}

/// When each stage was reached. The driver counts from the claim's arrival, which on
/// its clock and ours is the moment it was sent, give or take the wire.
struct Timeline {
    claimed: Duration,
    stages: Vec<Stage>,
}

impl Timeline {
    fn new(received: Instant, sent: Instant) -> Self {
        let claimed = sent - received;
        let stages = vec![stage("received", Duration::ZERO), stage("claimed", claimed)];
        Self { claimed, stages }
    }

    fn driver(&mut self, name: &str, after: Option<prost_types::Duration>) {
        if let Some(after) = after.and_then(|after| Duration::try_from(after).ok()) {
            self.stages.push(stage(name, self.claimed + after));
        }
    }
}

fn stage(name: &str, at: Duration) -> Stage {
    Stage {
        name: name.to_owned(),
        at: at.try_into().ok(),
    }
}

fn encode_output(output: node::Output) -> Output {
    Output {
        offset: output.offset,
        data: output.data,
    }
}

fn encode_end(end: node::Ended, timeline: Vec<Stage>) -> Exited {
    let reason = match end.reason() {
        ended::Reason::Unspecified => ExitReason::Unspecified,
        ended::Reason::Exited => ExitReason::Exited,
        ended::Reason::Signaled => ExitReason::Signaled,
        ended::Reason::OutOfMemory => ExitReason::OutOfMemory,
        ended::Reason::Deadline => ExitReason::Deadline,
        ended::Reason::Cancelled => ExitReason::Cancelled,
        ended::Reason::NotStarted => ExitReason::NotStarted,
        ended::Reason::Lost => ExitReason::Lost,
    };
    Exited {
        reason: reason.into(),
        exit_code: end.exit_code,
        signal: end.signal,
        message: end.message,
        timeline,
        warm: true,
        stdout_bytes: end.stdout_bytes,
        stderr_bytes: end.stderr_bytes,
    }
}
