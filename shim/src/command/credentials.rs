//! `polydev-shim credentials ...`: commands that call a shim, and one that seals locally.

mod seal;

use std::process::ExitCode;

use polydev_cli::credentials;

#[derive(clap::Subcommand)]
pub(super) enum Command {
    #[command(flatten)]
    Shim(credentials::Command),
    /// Seal a credential locally with a master key, and print the record in base64; for callers
    /// that store credentials themselves. This command calls no shim.
    Seal(seal::Seal),
}

pub(super) async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Shim(command) => credentials::execute(command).await,
        Command::Seal(arguments) => seal::seal(&arguments),
    }
}
