//! Connects a run to a terminal: events go to stdout and stderr, stdin and signals go to the
//! command.

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
    time::Duration,
};

use anyhow::bail;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use futures_util::StreamExt;
use polydev_client::{Input, Run};
use polydev_proto::runtime::{
    self, ApiError, ApprovalRequired, ExitReason, Exited, ModelUsage, Started, run_event::Event,
    started,
};
use serde_json::json;
use tokio::{
    io::AsyncReadExt,
    signal::unix::{self, SignalKind},
};

use super::{
    FAILED, Output, agent,
    conversation::Conversation,
    egress::{self, host_and_port},
    files::Receiver,
    terminal::{self, Raw},
    told,
};

const SIGINT: u8 = 2;
/// Bytes in one read.
pub(super) const MAX_CHUNK: usize = 64 << 10;

/// Prints a run to its end and sends signals to it. Returns the exit status. While the run waits
/// for a slot, a signal ends this program.
pub(super) async fn print(
    mut run: Run,
    mut signals: Signals,
    mut artifacts: Receiver,
    conversation: Option<Conversation>,
    output: Output,
    timeline: bool,
) -> anyhow::Result<ExitCode> {
    let (input, mut reached) = (run.input(), run.reached());
    let (mut is_accepted, mut started) = (false, Started::default());
    let mut screen = agent::Screen::new(output, conversation.is_some());
    // While the run waits for a slot, keys are for this program.
    let mut raw = None;
    loop {
        let event = tokio::select! {
            event = run.next() => event,
            Ok(()) = reached.changed() => {
                let is_reached = *reached.borrow_and_update();
                if raw.is_none() {
                    eprintln!("polydev-shim: {}", match is_reached {
                        true => "the connection is back, the run continues",
                        false => "the connection is lost, trying again",
                    });
                }
                continue;
            }
            asked = signals.next() => {
                let number = match asked {
                    Asked::Signal(number) => number,
                    Asked::Resize => {
                        input.resize(terminal::size()?);
                        continue;
                    }
                };
                // Without a shim nobody else can handle the signal.
                if !is_accepted || !*reached.borrow() {
                    return Ok(ExitCode::from(128 + number));
                }
                let is_interrupt = number == SIGINT;
                if conversation.as_ref().is_some_and(|turns| is_interrupt && turns.cancel()) {
                    continue;
                }
                // The command decides what the signal does.
                input.signal(number.into());
                continue;
            }
        };
        let Some(event) = event else {
            bail!("the shim ended the stream before the run's end")
        };
        let event = event.map_err(told)?;
        match &event {
            Event::Accepted(_) => {
                is_accepted = true;
                raw = signals.resize.is_some().then(Raw::new).transpose()?;
            }
            Event::Started(with) => started = with.clone(),
            _ => {}
        }
        match &mut screen {
            Some(screen) => screen.print(&event)?,
            None => print_event(&event, output)?,
        }
        if output == Output::Text {
            artifacts.on(&event)?;
        }
        if let Some(turns) = &conversation {
            turns.on(&event);
        }
        if let Event::Exited(exited) = event {
            drop(raw.take());
            let code = finish(&exited, &started, output, timeline);
            if !artifacts.is_complete() {
                bail!("some artifacts are missing");
            }
            return Ok(code);
        }
    }
}

/// Signals to this program, from its terminal or from other processes.
pub(super) struct Signals {
    interrupt: unix::Signal,
    terminate: unix::Signal,
    hangup: unix::Signal,
    /// Only for a run with a terminal.
    resize: Option<unix::Signal>,
}

/// What a signal to this program asks for.
pub(super) enum Asked {
    /// The command should get the signal with this number.
    Signal(u8),
    /// The terminal has another size.
    Resize,
}

impl Signals {
    pub(super) fn new(tty: bool) -> std::io::Result<Self> {
        let resize = tty.then(|| unix::signal(SignalKind::window_change()));
        Ok(Self {
            interrupt: unix::signal(SignalKind::interrupt())?,
            terminate: unix::signal(SignalKind::terminate())?,
            hangup: unix::signal(SignalKind::hangup())?,
            resize: resize.transpose()?,
        })
    }

    /// The next signal.
    pub(super) async fn next(&mut self) -> Asked {
        let resized = async {
            match &mut self.resize {
                Some(resize) => resize.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.hangup.recv() => Asked::Signal(1),
            _ = self.interrupt.recv() => Asked::Signal(SIGINT),
            _ = self.terminate.recv() => Asked::Signal(15),
            _ = resized => Asked::Resize,
        }
    }
}

pub(super) async fn forward_stdin(input: Input) {
    let mut stdin = tokio::io::stdin();
    let mut chunk = vec![0; MAX_CHUNK];
    loop {
        let chunk = match stdin.read(&mut chunk).await {
            Ok(0) | Err(_) => return input.close(),
            Ok(count) => Bytes::copy_from_slice(&chunk[..count]),
        };
        if input.write(chunk).await.is_err() {
            return;
        }
    }
}

/// Prints an event and flushes it at once: a reader of the output should wait only for the run.
pub(super) fn print_event(event: &Event, output: Output) -> anyhow::Result<()> {
    let (mut stdout, mut stderr) = (std::io::stdout().lock(), std::io::stderr().lock());
    match (output, event) {
        (Output::Text, Event::Stdout(bytes)) => {
            stdout.write_all(&bytes.data)?;
            stdout.flush()?;
        }
        (Output::Text, Event::Stderr(bytes)) => {
            stderr.write_all(&bytes.data)?;
            stderr.flush()?;
        }
        (Output::Text, Event::Queued(queued)) => {
            if stderr.is_terminal() {
                let before = queued.before;
                writeln!(
                    stderr,
                    "waiting for a slot, {before} runs are ahead of this one"
                )?;
            }
        }
        (Output::Text, Event::ApprovalRequired(required)) => {
            let ApprovalRequired {
                approval_id,
                reason,
                expires_at,
            } = required;
            let until = expires_at.map(|at| at.to_string()).unwrap_or_default();
            writeln!(
                stderr,
                "polydev-shim: waits until {until} for the approval {approval_id}: {reason}"
            )?;
        }
        (Output::Text, Event::Lost(lost)) => {
            let (stream, bytes) = (stream(lost), lost.to - lost.from);
            writeln!(stderr, "polydev-shim: {bytes} bytes of {stream} are lost")?;
        }
        (Output::Text, Event::ApiErrors(errors)) => {
            let errors: Vec<String> = errors.errors.iter().map(api_error).collect();
            writeln!(stderr, "polydev-shim: {}", errors.join("; "))?;
        }
        (Output::Text, Event::EgressDenied(denied)) => {
            for destination in &denied.destinations {
                let (target, reason) = (host_and_port(destination), &destination.denied);
                writeln!(stderr, "polydev-shim: no connection to {target}: {reason}")?;
            }
        }
        (
            Output::Text,
            Event::Accepted(_)
            | Event::Started(_)
            | Event::Exited(_)
            | Event::Artifacts(_)
            | Event::ArtifactData(_)
            // See `agent::Screen`.
            | Event::AgentEvents(_),
        ) => {}
        (Output::Json, event) => {
            writeln!(stdout, "{}", to_json(event))?;
            stdout.flush()?;
        }
    }
    Ok(())
}

fn to_json(event: &Event) -> serde_json::Value {
    let bytes = |name: &str, output: &runtime::Output| {
        json!({
            "event": name,
            "offset": output.offset,
            "data": BASE64_STANDARD.encode(&output.data),
        })
    };
    match event {
        Event::Accepted(accepted) => json!({
            "event": "accepted",
            "run_id": accepted.run_id,
            "slot_id": accepted.slot_id,
            "generation": accepted.generation,
            "node_id": accepted.node_id,
            "warm": accepted.warm,
        }),
        Event::Started(started) => match form(started) {
            None => json!({ "event": "started" }),
            Some(agent) => json!({
                "event": "started",
                "agent": agent,
                "cold_reason": started.cold_reason,
            }),
        },
        Event::ApprovalRequired(required) => json!({
            "event": "approval_required",
            "approval_id": required.approval_id,
            "reason": required.reason,
            "expires_at": required.expires_at.map(|at| at.to_string()),
        }),
        Event::Queued(queued) => json!({ "event": "queued", "before": queued.before }),
        Event::Lost(lost) => json!({
            "event": "lost",
            "stream": stream(lost),
            "from": lost.from,
            "to": lost.to,
        }),
        Event::Stdout(output) => bytes("stdout", output),
        Event::Stderr(output) => bytes("stderr", output),
        Event::Artifacts(artifacts) => json!({
            "event": "artifacts",
            "files": artifacts.files.iter().map(|file| json!({
                "path": file.path,
                "mode": format!("{:04o}", file.mode),
                "size": file.size,
            })).collect::<Vec<_>>(),
            "left_out": artifacts.left_out.iter().map(|file| json!({
                "path": file.path,
                "reason": file.reason,
            })).collect::<Vec<_>>(),
            "left_out_count": artifacts.left_out_count,
        }),
        Event::ArtifactData(output) => bytes("artifact_data", output),
        Event::AgentEvents(told) => json!({
            "event": "agent_events",
            "events": told.events.iter().filter_map(agent::to_json).collect::<Vec<_>>(),
            "end_offset": told.end_offset,
        }),
        Event::ApiErrors(errors) => json!({
            "event": "api_errors",
            "errors": api_errors_json(&errors.errors),
        }),
        Event::EgressDenied(denied) => json!({
            "event": "egress_denied",
            "destinations": denied.destinations.iter().map(egress::to_json).collect::<Vec<_>>(),
        }),
        Event::Exited(exited) => {
            let timeline: serde_json::Map<_, _> = stages(exited)
                .map(|(name, at)| (name.to_owned(), json!(at.as_secs_f64() * 1e3)))
                .collect();
            json!({
                "event": "exited",
                "reason": reason(exited),
                "exit_code": exited.exit_code,
                "signal": exited.signal,
                "message": exited.message,
                "warm": exited.warm,
                "stdout_bytes": exited.stdout_bytes,
                "stderr_bytes": exited.stderr_bytes,
                "artifact_bytes": exited.artifact_bytes,
                "oom_kills": exited.oom_kills,
                "usage": usage_json(&exited.usage),
                "api_errors": api_errors_json(&exited.api_errors),
                "timeline_ms": timeline,
            })
        }
    }
}

pub(super) fn api_error(error: &ApiError) -> String {
    let ApiError {
        provider,
        status,
        count,
    } = error;
    let times = if *count == 1 {
        ""
    } else {
        &format!(" ({count} times)")
    };
    match status {
        0 => format!("the API of {provider} could not be reached{times}"),
        _ => format!("the API of {provider} answered with status {status}{times}"),
    }
}

pub(super) fn api_errors_json(errors: &[ApiError]) -> serde_json::Value {
    let error = |error: &ApiError| json!({ "provider": error.provider, "status": error.status, "count": error.count });
    errors.iter().map(error).collect()
}

pub(super) fn usage_json(usage: &[ModelUsage]) -> serde_json::Value {
    let used = |used: &ModelUsage| {
        json!({
            "provider": used.provider,
            "model": used.model,
            "requests": used.requests,
            "input_tokens": used.input_tokens,
            "cached_input_tokens": used.cached_input_tokens,
            "cache_write_tokens": used.cache_write_tokens,
            "output_tokens": used.output_tokens,
        })
    };
    usage.iter().map(used).collect()
}

/// What became of a prompt's agent, in one word. `None` for an argv.
fn form(started: &Started) -> Option<&'static str> {
    match started.agent() {
        started::Agent::Unspecified => None,
        started::Agent::Parked => Some("parked"),
        started::Agent::Cold => Some("cold"),
    }
}

/// The reason for a run's end, in one word.
pub(super) fn reason(exited: &Exited) -> String {
    let name = exited.reason().as_str_name();
    name.trim_start_matches("EXIT_REASON_").to_lowercase()
}

fn stream(lost: &runtime::Lost) -> &'static str {
    match lost.stream() {
        runtime::Stream::Stderr => "stderr",
        runtime::Stream::Artifacts => "artifacts",
        runtime::Stream::Events => "agent_events",
        runtime::Stream::Stdout | runtime::Stream::Unspecified => "stdout",
    }
}

fn stages(exited: &Exited) -> impl Iterator<Item = (&str, Duration)> {
    exited.timeline.iter().filter_map(|stage| {
        let at = stage.at.and_then(|at| Duration::try_from(at).ok())?;
        Some((stage.name.as_str(), at))
    })
}

fn finish(exited: &Exited, started: &Started, output: Output, timeline: bool) -> ExitCode {
    if timeline {
        if let Some(agent) = form(started) {
            let reason = Some(&started.cold_reason).filter(|reason| !reason.is_empty());
            let reason = reason.map(|reason| format!(": {reason}"));
            eprintln!("{:>14}  {agent}{}", "agent", reason.unwrap_or_default());
        }
        for (name, at) in stages(exited) {
            eprintln!("{name:>14}  {:>10.3} ms", at.as_secs_f64() * 1e3);
        }
    }
    if output == Output::Text && exited.reason() != ExitReason::Exited {
        eprintln!("polydev-shim: {}", exited.message);
    }
    // The reason says it otherwise.
    if output == Output::Text && exited.reason() != ExitReason::OutOfMemory {
        match exited.oom_kills {
            0 => {}
            1 => eprintln!("polydev-shim: out of memory: the kernel killed a process of the run"),
            many => {
                eprintln!(
                    "polydev-shim: out of memory: the kernel killed {many} processes of the run"
                );
            }
        }
    }
    let code = match exited.reason() {
        ExitReason::Lost | ExitReason::Unspecified => FAILED,
        _ => u8::try_from(exited.exit_code).unwrap_or(FAILED),
    };
    ExitCode::from(code)
}
