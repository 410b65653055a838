//! `polydev-shim credentials ...`

mod given;
mod keep;
mod seal;

pub(super) use given::Given;

use std::process::ExitCode;

use crate::provider::Provider;

/// Whose credential, and what for.
#[derive(clap::Args)]
struct Name {
    /// openai, anthropic or google.
    provider: Provider,
    /// Whose it is.
    #[arg(long, default_value = "local")]
    user: String,
}

#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Keep a credential in the shim's store, in place of the one there was.
    Put(keep::Put),
    /// Show what credentials are kept; never what is in them.
    List(keep::List),
    /// Remove a credential. Runs that have it keep it.
    Delete(keep::Delete),
    /// Seal with the shim's first master key what others have sealed.
    Rotate(keep::Rotate),
    /// Seal a credential here, with a master key, and print the record in base64: for callers
    /// that keep credentials themselves. No shim is asked.
    Seal(seal::Seal),
}

pub(super) async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Put(arguments) => keep::put(arguments).await,
        Command::List(arguments) => keep::list(arguments).await,
        Command::Delete(arguments) => keep::delete(arguments).await,
        Command::Rotate(arguments) => keep::rotate(arguments).await,
        Command::Seal(arguments) => seal::seal(&arguments),
    }
}
