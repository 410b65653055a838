//! `polydev-shim credentials ...`

mod given;
mod keep;

pub use given::Given;

use std::process::ExitCode;

use polydev_proto::provider::Provider;

/// Whose credential, and what for.
#[derive(clap::Args)]
pub struct Name {
    /// openai, anthropic or google.
    pub provider: Provider,
    /// Whose it is.
    #[arg(long, default_value = "local")]
    pub user: String,
}

#[derive(clap::Subcommand)]
pub enum Command {
    /// Keep a credential in the shim's store, in place of the one there was.
    Put(keep::Put),
    /// Show what credentials are kept; never what is in them.
    List(keep::List),
    /// Remove a credential. Runs that have it keep it.
    Delete(keep::Delete),
    /// Seal with the shim's first master key what others have sealed.
    Rotate(keep::Rotate),
}

/// # Errors
/// If the shim cannot be reached, or refuses the call.
pub async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Put(arguments) => keep::put(arguments).await,
        Command::List(arguments) => keep::list(arguments).await,
        Command::Delete(arguments) => keep::delete(arguments).await,
        Command::Rotate(arguments) => keep::rotate(arguments).await,
    }
}
