//! `polydev-shim pool ...`

mod apply;
mod look;
mod size;

use std::{io::Write, process::ExitCode};

use polydev_proto::runtime::runtime_service_client::RuntimeServiceClient;
use tonic::{Status, transport::Channel};

use super::{Client, Output};

#[derive(clap::Subcommand)]
pub(super) enum Command {
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
    /// Submit job files to Nomad, after showing what would change.
    Apply(apply::Arguments),
}

#[derive(clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    client: Client,
    /// How to print results.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

impl Options {
    async fn connect(&self) -> anyhow::Result<RuntimeServiceClient<Channel>> {
        let channel = super::run::connect(&self.client.address).await?;
        Ok(RuntimeServiceClient::new(channel))
    }
}

pub(super) async fn execute(command: Command) -> anyhow::Result<ExitCode> {
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
        Command::Apply(arguments) => apply::apply(&arguments).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The shim's words.
fn told(status: Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}

fn print(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}
