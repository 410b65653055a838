//! `polydev-shim run`: runs a command through a shim, for people and scripts.

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf, process::ExitCode};

use bytes::Bytes;
use polydev_client::Calls;
use polydev_proto::{
    provider::Provider,
    runtime::{
        self, Argv, ArtifactRules, Credential, CredentialMode, Prompt, RunStart, StoredCredential,
        SubmitJobRequest, credential, run_event::Event, run_start::Command,
    },
};
use tonic::metadata::{MetadataMap, MetadataValue};

use super::{
    Client, Output,
    conversation::Conversation,
    credentials,
    files::{Given, Opened, Receiver},
    print,
    stream::{self, Signals, forward_stdin},
    terminal, told,
};

/// Where a credential is during a run.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Mode {
    /// Outside of the container: the node's broker puts the API key into model requests.
    Broker,
    /// In the command's environment and files.
    Inject,
}

/// What a model may use.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Tools {
    /// It answers.
    None,
    /// It reads files, and finds them.
    Read,
    /// All tools of its CLI.
    All,
}

impl Tools {
    fn to_api(self) -> runtime::Tools {
        match self {
            Self::None => runtime::Tools::None,
            Self::Read => runtime::Tools::Read,
            Self::All => runtime::Tools::All,
        }
    }
}

#[derive(clap::Args)]
pub struct Arguments {
    /// openai, anthropic, google or python.
    provider: Provider,
    #[command(flatten)]
    client: Client,
    /// User that the run belongs to.
    #[arg(long, default_value = "local")]
    user: String,
    /// Prompt for the provider's CLI, instead of a command.
    #[arg(long, conflicts_with = "argv", required_unless_present_any = ["argv", "conversation"])]
    prompt: Option<String>,
    /// Take each line of stdin as a further prompt to the same session. Ctrl-C ends an answer, the end
    /// of stdin ends the run.
    #[arg(long, conflicts_with_all = ["argv", "detach", "tty"])]
    conversation: bool,
    /// The provider's name of the model that answers the prompt. [default: the CLI's choice]
    #[arg(long, conflicts_with = "argv")]
    model: Option<String>,
    /// Text that is added to the CLI's own system text.
    #[arg(long, conflicts_with = "argv", value_name = "TEXT")]
    system: Option<String>,
    /// What the model may use. [default: what the caller's role allows]
    #[arg(long, conflicts_with = "argv", value_enum)]
    tools: Option<Tools>,
    /// Vouch for the contents of the files that are sent, as for the prompt itself. Matters in a pool
    /// whose policy decides about tools.
    #[arg(long, conflicts_with = "argv")]
    trust_files: bool,
    #[command(flatten)]
    credential: credentials::Given,
    /// Use the credential that the shim has stored for the user.
    #[arg(long, conflicts_with = "Given")]
    stored: bool,
    /// Where the credential is during the run. [default: outside of the container if it is an
    /// API key, else in it]
    #[arg(long, value_name = "MODE", value_enum)]
    credential_mode: Option<Mode>,
    /// Set an environment variable of the command; may be repeated.
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Working directory of the command.
    #[arg(long, default_value = "")]
    work_dir: String,
    /// Seconds to wait for a slot, 0 to 1800.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    queue_timeout: u32,
    /// Seconds until the command gets SIGTERM, 1 to 86400.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u32,
    /// Seconds that the provider's API may be overloaded or out of reach before the run is ended,
    /// 1 to 86400. Needs a key outside of the container. [default: no limit]
    #[arg(long, value_name = "SECONDS")]
    max_api_wait: Option<u32>,
    /// Give the command a terminal with this one's size and keys, as `docker run -it` does.
    #[arg(long, short, conflicts_with_all = ["detach", "output", "prompt"])]
    tty: bool,
    /// Copy a file into `/workspace`, under its own name or as PATH; may be repeated.
    #[arg(long, value_name = "SOURCE[:PATH]")]
    file: Vec<Given>,
    /// When the command has ended, fetch the files of `/workspace` that match a pattern, such as
    /// `out/*.csv` or `**/*.log`; may be repeated.
    #[arg(long, value_name = "PATTERN")]
    artifact: Vec<String>,
    /// Folder for the artifacts. With `--output json` the artifacts are printed, not written.
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    artifacts_to: PathBuf,
    /// Do not stream the run: print its id once it has claimed a slot, and exit. `runs attach`
    /// streams its output later.
    #[arg(long, short, conflicts_with = "timeline")]
    detach: bool,
    /// How to print the run: the command's output, or every event as a JSON object.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    /// Print the timeline to stderr when the run has ended.
    #[arg(long)]
    timeline: bool,
    /// The command and its arguments. The command reads this program's stdin.
    #[arg(last = true)]
    argv: Vec<OsString>,
}

pub(super) fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text
        .split_once('=')
        .ok_or_else(|| format!("`{text}` is not NAME=VALUE"))?;
    Ok((name.to_owned(), value.to_owned()))
}

/// # Errors
/// If the run cannot be started, or cannot be followed to its end.
pub async fn execute(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let files = Opened::new(&arguments.file).await?;
    let mut start = start(&arguments)?;
    start.files = files.list();
    let tty = arguments.tty.then(terminal::size).transpose()?;
    start.terminal = tty;
    let shim = arguments.client.connect().await?.with_metadata(trace());

    if arguments.detach {
        return detach(shim.calls(), start, files, arguments.output).await;
    }
    let reads_stdin = start.stdin;
    let signals = Signals::new(tty.is_some())?;
    let run = shim.run(start);
    let input = run.input();
    let has_first = arguments
        .prompt
        .as_ref()
        .is_some_and(|text| !text.is_empty());
    let conversation =
        (arguments.conversation).then(|| Conversation::new(input.clone(), has_first));
    let turns = conversation.clone();
    tokio::spawn(async move {
        files.send(&input).await;
        match turns {
            Some(turns) => turns.forward_stdin().await,
            None if reads_stdin => forward_stdin(input).await,
            None => {}
        }
    });
    stream::print(
        run,
        signals,
        Receiver::new(&arguments.artifacts_to),
        conversation,
        arguments.output,
        arguments.timeline,
    )
    .await
}

/// The trace context from the environment.
fn trace() -> MetadataMap {
    let mut metadata = MetadataMap::new();
    for name in ["traceparent", "tracestate"] {
        let value = std::env::var(name.to_uppercase()).unwrap_or_default();
        if let Ok(value) = MetadataValue::try_from(value)
            && !value.is_empty()
        {
            metadata.insert(name, value);
        }
    }
    metadata
}

async fn detach(
    mut shim: Calls,
    start: RunStart,
    files: Opened,
    output: Output,
) -> anyhow::Result<ExitCode> {
    let request = SubmitJobRequest {
        start: Some(RunStart {
            stdin: false,
            files: files.read().await?,
            ..start
        }),
    };
    let submitted = shim.submit_job(request).await.map_err(told)?;
    let accepted = submitted.into_inner().accepted.unwrap_or_default();
    match output {
        Output::Text => print(&format!("{}\n", accepted.run_id))?,
        Output::Json => stream::print_event(&Event::Accepted(accepted), output)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn start(arguments: &Arguments) -> anyhow::Result<RunStart> {
    let (command, stdin) = match arguments.prompt.is_some() || arguments.conversation {
        true => {
            let prompt = Prompt {
                text: arguments.prompt.clone().unwrap_or_default(),
                model: arguments.model.clone().unwrap_or_default(),
                conversation: arguments.conversation,
                system: arguments.system.clone().unwrap_or_default(),
                tools: arguments.tools.map_or(0, |tools| tools.to_api().into()),
                trust_files: arguments.trust_files,
            };
            (Command::Prompt(prompt), arguments.conversation)
        }
        false => {
            let bytes = |argument: &OsString| Bytes::from(argument.clone().into_vec());
            (
                Command::Argv(Argv {
                    args: arguments.argv.iter().map(bytes).collect(),
                    ..Argv::default()
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
        credential: credential(arguments)?,
        credential_mode: credential_mode(arguments.credential_mode).into(),
        work_dir: arguments.work_dir.clone(),
        stdin,
        artifacts: (!arguments.artifact.is_empty()).then(|| ArtifactRules {
            patterns: arguments.artifact.clone(),
            ..ArtifactRules::default()
        }),
        timeout: seconds(arguments.timeout),
        max_api_wait: arguments.max_api_wait.and_then(seconds),
        queue_timeout: seconds(arguments.queue_timeout),
        ..Default::default()
    })
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "the fields that it fills are optional"
)]
pub(super) fn seconds(seconds: u32) -> Option<prost_types::Duration> {
    let seconds = seconds.into();
    Some(prost_types::Duration { seconds, nanos: 0 })
}

fn credential_mode(given: Option<Mode>) -> CredentialMode {
    match given {
        None => CredentialMode::Unspecified,
        Some(Mode::Broker) => CredentialMode::Broker,
        Some(Mode::Inject) => CredentialMode::Inject,
    }
}

fn credential(arguments: &Arguments) -> anyhow::Result<Option<Credential>> {
    if arguments.stored {
        let source = Some(credential::Source::Stored(StoredCredential {}));
        return Ok(Some(Credential { source }));
    }
    let Ok(vendor) = arguments.provider.vendor() else {
        let provider = arguments.provider;
        let given = arguments.credential.is_given();
        anyhow::ensure!(!given, "`{provider}` takes no credential");
        return Ok(None);
    };
    arguments.credential.read(vendor)
}
