//! `polydev-shim run`: a caller of the shim, for people and scripts.

use std::{
    ffi::OsString,
    io::Write,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use polydev_proto::runtime::{
    self, Argv, CloseStdin, Credential, ExitReason, Exited, Prompt, RunRequest, RunStart, Signal,
    run_request::Message, run_response::Event, run_start::Command,
    runtime_service_client::RuntimeServiceClient,
};
use serde_json::json;
use tokio::{io::AsyncReadExt, signal::unix, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{metadata::MetadataValue, transport::Channel};

use super::{Client, FAILED, Output};
use crate::{address::Address, chain, provider::Provider};

pub(super) const CONNECT: Duration = Duration::from_secs(10);
/// The most the API takes in one message.
const CHUNK: usize = 64 << 10;
const QUEUE: usize = 8;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// openai, anthropic or google.
    provider: Provider,
    #[command(flatten)]
    client: Client,
    /// Whose run it is.
    #[arg(long, default_value = "local")]
    user: String,
    /// A prompt for the provider's CLI, in place of a command.
    #[arg(long, conflicts_with = "argv", required_unless_present = "argv")]
    prompt: Option<String>,
    /// The model that answers the prompt, by the provider's name. [default: the CLI's]
    #[arg(long, requires = "prompt")]
    model: Option<String>,
    /// File with the API key; without it the provider's variable is read:
    /// OPENAI_API_KEY, ANTHROPIC_API_KEY or GOOGLE_API_KEY (and GOOGLE_PROJECT_ID).
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Set an environment variable of the command; may be repeated.
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Working directory of the command.
    #[arg(long, default_value = "")]
    work_dir: String,
    /// Seconds until the command is told to end.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u32,
    /// How to print the run: its output as it is, or every event as a JSON object.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    /// Print the timeline to stderr when the run has ended.
    #[arg(long)]
    timeline: bool,
    /// The command and its arguments. Its stdin is this one's.
    #[arg(last = true)]
    argv: Vec<OsString>,
}

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text
        .split_once('=')
        .ok_or_else(|| format!("`{text}` is not NAME=VALUE"))?;
    Ok((name.to_owned(), value.to_owned()))
}

pub(super) async fn execute(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let start = start(&arguments)?;
    let channel = connect(&arguments.client.address).await?;
    let mut shim = RuntimeServiceClient::new(channel);

    let (requests, queue) = mpsc::channel(QUEUE);
    let reads_stdin = start.stdin;
    requests.try_send(request(Message::Start(Box::new(start))))?;
    let mut call = tonic::Request::new(ReceiverStream::new(queue));
    for name in ["traceparent", "tracestate"] {
        let value = std::env::var(name.to_uppercase()).unwrap_or_default();
        if let Ok(value) = MetadataValue::try_from(value)
            && !value.is_empty()
        {
            call.metadata_mut().insert(name, value);
        }
    }
    let mut interrupt = unix::signal(unix::SignalKind::interrupt())?;
    let mut terminate = unix::signal(unix::SignalKind::terminate())?;
    let accepted = tokio::select! {
        accepted = shim.run(call) => accepted,
        // Nothing runs yet: going away is all there is to do.
        _ = interrupt.recv() => return Ok(ExitCode::from(128 + 2)),
        _ = terminate.recv() => return Ok(ExitCode::from(128 + 15)),
    };
    let events = accepted.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    tokio::spawn(forward_signals(requests.clone(), interrupt, terminate));
    if reads_stdin {
        tokio::spawn(forward_stdin(requests));
    } else {
        // Signals keep the request side open.
        drop(requests);
    }

    let mut events = events.into_inner();
    loop {
        let event = events
            .message()
            .await
            .map_err(|status| anyhow::anyhow!("{}", status.message()))?;
        let Some(event) = event else {
            bail!("the shim ended the stream before the run's end")
        };
        let Some(event) = event.event else { continue };
        print(&event, arguments.output)?;
        if let Event::Exited(exited) = event {
            return Ok(finish(&exited, &arguments));
        }
    }
}

pub(super) async fn connect(address: &Address) -> anyhow::Result<Channel> {
    let endpoint = address.endpoint().connect_timeout(CONNECT);
    endpoint.connect().await.map_err(|error| {
        anyhow::anyhow!(
            "no shim answers at {address}: {}\nstart one with `polydev-shim serve` or `polydev-shim dev`",
            chain(&error)
        )
    })
}

fn start(arguments: &Arguments) -> anyhow::Result<RunStart> {
    let (command, stdin) = match &arguments.prompt {
        Some(text) => {
            let model = arguments.model.clone().unwrap_or_default();
            (
                Command::Prompt(Prompt {
                    text: text.clone(),
                    model,
                }),
                false,
            )
        }
        None => {
            let bytes = |argument: &OsString| Bytes::from(argument.clone().into_vec());
            (
                Command::Argv(Argv {
                    args: arguments.argv.iter().map(bytes).collect(),
                }),
                true,
            )
        }
    };
    Ok(RunStart {
        provider: arguments.provider.name().into(),
        user_id: arguments.user.clone(),
        command: Some(command),
        env: arguments.env.iter().cloned().collect(),
        credential: credential(arguments.provider, arguments.key_file.as_deref())?,
        work_dir: arguments.work_dir.clone(),
        stdin,
        timeout: Some(prost_types::Duration {
            seconds: arguments.timeout.into(),
            nanos: 0,
        }),
        ..Default::default()
    })
}

/// Never from the arguments: every process of the machine can read those.
fn credential(provider: Provider, file: Option<&Path>) -> anyhow::Result<Option<Credential>> {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let api_key = match file {
        Some(path) => {
            let key = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read --key-file `{}`", path.display()))?;
            Some(key.trim().to_owned())
        }
        None => variable(provider.key_variable()),
    };
    Ok(api_key.map(|api_key| Credential {
        api_key,
        project_id: provider
            .project_variable()
            .and_then(variable)
            .unwrap_or_default(),
    }))
}

fn request(message: Message) -> RunRequest {
    RunRequest {
        message: Some(message),
    }
}

/// Passes Ctrl-C and SIGTERM on to the command; it decides what becomes of them.
async fn forward_signals(
    requests: mpsc::Sender<RunRequest>,
    mut interrupt: unix::Signal,
    mut terminate: unix::Signal,
) {
    loop {
        let number = tokio::select! {
            _ = interrupt.recv() => unix::SignalKind::interrupt().as_raw_value(),
            _ = terminate.recv() => unix::SignalKind::terminate().as_raw_value(),
        };
        if requests
            .send(request(Message::Signal(Signal { number })))
            .await
            .is_err()
        {
            return;
        }
    }
}

async fn forward_stdin(requests: mpsc::Sender<RunRequest>) {
    let mut stdin = tokio::io::stdin();
    let mut chunk = vec![0; CHUNK];
    loop {
        let message = match stdin.read(&mut chunk).await {
            Ok(0) | Err(_) => Message::CloseStdin(CloseStdin {}),
            Ok(count) => Message::Stdin(Bytes::copy_from_slice(&chunk[..count])),
        };
        let last = matches!(message, Message::CloseStdin(_));
        if requests.send(request(message)).await.is_err() || last {
            return;
        }
    }
}

/// Output goes out as it comes: whoever reads this waits for the run, not for us.
fn print(event: &Event, output: Output) -> anyhow::Result<()> {
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
        (Output::Text, Event::Accepted(_) | Event::Started(_) | Event::Exited(_)) => {}
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
        Event::Started(_) => json!({ "event": "started" }),
        Event::Stdout(output) => bytes("stdout", output),
        Event::Stderr(output) => bytes("stderr", output),
        Event::Exited(exited) => {
            let timeline: serde_json::Map<_, _> = stages(exited)
                .map(|(name, at)| (name.to_owned(), json!(at.as_secs_f64() * 1e3)))
                .collect();
            json!({
                "event": "exited",
                "reason": exited.reason().as_str_name().trim_start_matches("EXIT_REASON_").to_lowercase(),
                "exit_code": exited.exit_code,
                "signal": exited.signal,
                "message": exited.message,
                "warm": exited.warm,
                "stdout_bytes": exited.stdout_bytes,
                "stderr_bytes": exited.stderr_bytes,
                "timeline_ms": timeline,
            })
        }
    }
}

fn stages(exited: &Exited) -> impl Iterator<Item = (&str, Duration)> {
    exited.timeline.iter().filter_map(|stage| {
        let at = stage.at.and_then(|at| Duration::try_from(at).ok())?;
        Some((stage.name.as_str(), at))
    })
}

fn finish(exited: &Exited, arguments: &Arguments) -> ExitCode {
    if arguments.timeline {
        for (name, at) in stages(exited) {
            eprintln!("{name:>14}  {:>10.3} ms", at.as_secs_f64() * 1e3);
        }
    }
    if arguments.output == Output::Text && exited.reason() != ExitReason::Exited {
        eprintln!("polydev-shim: {}", exited.message);
    }
    let code = match exited.reason() {
        ExitReason::Lost | ExitReason::Unspecified => FAILED,
        _ => u8::try_from(exited.exit_code).unwrap_or(FAILED),
    };
    ExitCode::from(code)
}
