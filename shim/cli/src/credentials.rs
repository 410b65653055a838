//! `polydev-shim credentials ...`

mod given;
mod keep;

pub use given::Given;

use std::process::ExitCode;

use polydev_proto::provider::Vendor;

/// The user that the credential belongs to, and the provider that it is for.
#[derive(clap::Args)]
pub struct Name {
    /// openai, anthropic or google.
    pub provider: Vendor,
    /// User that the credential belongs to.
    #[arg(long, default_value = "local")]
    pub user: String,
}

#[derive(clap::Subcommand)]
pub enum Command {
    /// Store a credential in the shim. It replaces the user's previous one for the provider.
    Put(keep::Put),
    /// List stored credentials, without their secrets.
    List(keep::List),
    /// Delete a stored credential. Runs that already have the credential keep it.
    Delete(keep::Delete),
    /// Seal credentials that another master key has sealed with the shim's first master key.
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
