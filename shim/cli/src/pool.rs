//! `polydev-shim pool ...`

mod look;
mod size;

use std::process::ExitCode;

use super::Options;

#[derive(clap::Subcommand)]
pub enum Command {
    /// Show each provider's slots by state.
    List(Options),
    /// Show a provider's slots one by one.
    Show {
        /// openai, anthropic or google.
        provider: String,
        #[command(flatten)]
        options: Options,
    },
    /// Show each provider's slots by state after each change, until Ctrl-C.
    Watch(Options),
    /// Set how many warm slots a provider has, as `nomad job scale` does.
    Scale {
        /// openai, anthropic or google.
        provider: String,
        /// Number of warm slots, 0 to 100. A slot that is removed finishes its run first.
        size: u32,
        #[command(flatten)]
        options: Options,
    },
    /// Take a pool out of use: set its size to 0, and wait until its last run has ended.
    Drain {
        /// openai, anthropic or google.
        provider: String,
        /// Do not wait for the pool's runs.
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        options: Options,
    },
    /// Set a drained pool to the size that it had before.
    Resume {
        /// openai, anthropic or google.
        provider: String,
        #[command(flatten)]
        options: Options,
    },
}

/// # Errors
/// If the shim cannot be reached, or refuses the call.
pub async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::List(options) => look::list(&options).await?,
        Command::Show { provider, options } => look::show(&options, provider).await?,
        Command::Watch(options) => look::watch(&options).await?,
        Command::Scale {
            provider,
            size,
            options,
        } => size::scale(&options, provider, size).await?,
        Command::Drain {
            provider,
            detach,
            options,
        } => size::drain(&options, provider, detach).await?,
        Command::Resume { provider, options } => size::resume(&options, provider).await?,
    }
    Ok(ExitCode::SUCCESS)
}
