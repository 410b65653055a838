//! `polydev-shim pool ...`: commands that call a shim, and one that calls Nomad.

mod apply;

use std::process::ExitCode;

use polydev_cli::pool;

#[derive(clap::Subcommand)]
pub(super) enum Command {
    #[command(flatten)]
    Shim(pool::Command),
    /// Show what would change in Nomad, then submit job files.
    Apply(apply::Arguments),
}

pub(super) async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Shim(command) => pool::execute(command).await,
        Command::Apply(arguments) => {
            apply::apply(&arguments).await?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
