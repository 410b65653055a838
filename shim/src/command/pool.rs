//! `polydev-shim pool ...`: what is asked of a shim, and what of Nomad.

mod apply;

use std::process::ExitCode;

use polydev_cli::pool;

#[derive(clap::Subcommand)]
pub(super) enum Command {
    #[command(flatten)]
    Shim(pool::Command),
    /// Submit job files to Nomad, after showing what would change.
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
