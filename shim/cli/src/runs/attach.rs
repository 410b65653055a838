//! `polydev-shim runs attach|cancel`: for runs that another call has started.

use std::{path::PathBuf, process::ExitCode};

use polydev_proto::runtime::{AttachStart, CancelRunRequest};

use super::Name;
use crate::{
    Client, Output, answer,
    files::Receiver,
    stream::{self, Signals},
};

#[derive(clap::Args)]
pub struct Attach {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    client: Client,
    /// Offset of the first byte of stdout to print.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    stdout_offset: u64,
    /// Offset of the first byte of stderr to print.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    stderr_offset: u64,
    /// Folder for the artifacts. With `--output json` the artifacts are printed, not written.
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    artifacts_to: PathBuf,
    /// How to print the run: the command's output, or every event as a JSON object.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(clap::Args)]
pub struct Cancel {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    client: Client,
}

pub(super) async fn attach(arguments: Attach) -> anyhow::Result<ExitCode> {
    let shim = arguments.client.connect().await?;
    let run = shim.attach(AttachStart {
        run_id: arguments.name.run_id,
        user_id: arguments.name.user,
        stdout_offset: arguments.stdout_offset,
        stderr_offset: arguments.stderr_offset,
        artifact_offset: 0,
        event_offset: 0,
    });
    let signals = Signals::new(false)?;
    let artifacts = Receiver::new(&arguments.artifacts_to);
    stream::print(run, signals, artifacts, None, arguments.output, false).await
}

pub(super) async fn cancel(arguments: Cancel) -> anyhow::Result<ExitCode> {
    let shim = arguments.client.connect().await?;
    let request = CancelRunRequest {
        run_id: arguments.name.run_id,
        user_id: arguments.name.user,
    };
    answer(shim.calls().cancel_run(request)).await?;
    Ok(ExitCode::SUCCESS)
}
