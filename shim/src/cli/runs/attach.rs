//! `polydev-shim runs attach|cancel`: for a run that another call has started.

use std::{path::PathBuf, process::ExitCode};

use futures_util::StreamExt;
use polydev_proto::runtime::{
    AttachRequest, AttachStart, CancelRunRequest, attach_request::Message,
    runtime_service_client::RuntimeServiceClient,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::Name;
use crate::cli::{
    Client, Output, answer,
    files::Receiver,
    stream::{self, QUEUE, Signals},
    told,
};

#[derive(clap::Args)]
pub(in crate::cli) struct Attach {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    client: Client,
    /// First byte of stdout to print.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    stdout_offset: u64,
    /// First byte of stderr to print.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    stderr_offset: u64,
    /// Folder for the artifacts. With `--output json` they are events, and not written.
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    artifacts_to: PathBuf,
    /// How to print the run: its output as it is, or every event as a JSON object.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(clap::Args)]
pub(in crate::cli) struct Cancel {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    client: Client,
}

pub(super) async fn attach(arguments: Attach) -> anyhow::Result<ExitCode> {
    let channel = arguments.client.connect().await?;
    let mut shim = RuntimeServiceClient::new(channel);
    let (inputs, queue) = mpsc::channel(QUEUE);
    let first = Message::Start(AttachStart {
        run_id: arguments.name.run_id,
        user_id: arguments.name.user,
        stdout_offset: arguments.stdout_offset,
        stderr_offset: arguments.stderr_offset,
        artifact_offset: 0,
    });
    // The end of the requests would close the command's stdin: signals keep them open.
    let rest = ReceiverStream::new(queue).map(Message::Input);
    let requests = futures_util::stream::iter([first])
        .chain(rest)
        .map(|message| AttachRequest {
            message: Some(message),
        });
    let signals = Signals::new(false)?;
    let events = shim.attach(requests).await;
    let events = events
        .map_err(told)?
        .into_inner()
        .map(|response| Ok(response?.event));
    let artifacts = Receiver::new(&arguments.artifacts_to);
    stream::print(events, inputs, signals, artifacts, arguments.output, false).await
}

pub(super) async fn cancel(arguments: Cancel) -> anyhow::Result<ExitCode> {
    let channel = arguments.client.connect().await?;
    let request = CancelRunRequest {
        run_id: arguments.name.run_id,
        user_id: arguments.name.user,
    };
    let mut shim = RuntimeServiceClient::new(channel);
    answer(shim.cancel_run(request)).await?;
    Ok(ExitCode::SUCCESS)
}
