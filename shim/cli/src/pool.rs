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
    /// Show each provider's slots by state, and again whenever they change, until Ctrl-C.
    Watch(Options),
    /// Set how many warm slots a provider has, as `nomad job scale` does.
    Scale {
        /// openai, anthropic or google.
        provider: String,
        /// Warm slots to keep, 0 to 100. Runs in slots that go are not cut short.
        size: u32,
        #[command(flatten)]
        options: Options,
    },
    /// Take a pool out of use: size 0, and wait until its last run has ended.
    Drain {
        /// openai, anthropic or google.
        provider: String,
        /// Do not wait for its runs.
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        options: Options,
    },
    /// Give a drained pool the size that it had.
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
