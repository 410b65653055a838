//! `polydev-shim credentials ...`: what is asked of a shim, and what needs a master key here.

mod seal;

use std::process::ExitCode;

use polydev_cli::credentials;

#[derive(clap::Subcommand)]
pub(super) enum Command {
    #[command(flatten)]
    Shim(credentials::Command),
    /// Seal a credential here, with a master key, and print the record in base64: for callers
    /// that keep credentials themselves. No shim is asked.
    Seal(seal::Seal),
}

pub(super) async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Shim(command) => credentials::execute(command).await,
        Command::Seal(arguments) => seal::seal(&arguments),
    }
}
