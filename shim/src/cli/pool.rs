//! `polydev-shim pool ...`

use std::{io::Write, process::ExitCode};

use polydev_proto::runtime::{
    ListPoolsRequest, ScalePoolRequest, ScalePoolResponse, ScaleWaiting, Scaled,
    runtime_service_client::RuntimeServiceClient, scale_pool_response::Event,
};
use serde_json::json;

use super::{Client, Output};

#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Show each provider's slots by state.
    List {
        #[command(flatten)]
        client: Client,
        /// How to print them.
        #[arg(long, value_enum, default_value = "text")]
        output: Output,
    },
    /// Set how many warm slots a provider has, as `nomad job scale` does.
    Scale {
        /// openai, anthropic or google.
        provider: String,
        /// Warm slots to keep, 0 to 100. Runs in slots that go are not cut short.
        size: u32,
        #[command(flatten)]
        client: Client,
        /// How to print the result.
        #[arg(long, value_enum, default_value = "text")]
        output: Output,
    },
}

pub(super) async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::List { client, output } => list(&client, output).await,
        Command::Scale {
            provider,
            size,
            client,
            output,
        } => scale(&client, provider, size, output).await,
    }
}

/// Waits as long as the shim does for Nomad, and says so.
async fn scale(
    client: &Client,
    provider: String,
    size: u32,
    output: Output,
) -> anyhow::Result<ExitCode> {
    let told = |status: tonic::Status| anyhow::anyhow!("{}", status.message());
    let mut shim = RuntimeServiceClient::new(super::run::connect(&client.address).await?);
    let request = ScalePoolRequest {
        provider: provider.clone(),
        size,
    };
    let mut events = shim.scale_pool(request).await.map_err(told)?.into_inner();
    while let Some(ScalePoolResponse { event }) = events.message().await.map_err(told)? {
        match event {
            Some(Event::Waiting(ScaleWaiting { reason })) => {
                eprintln!("waiting for Nomad to take a new size: {reason}");
            }
            Some(Event::Scaled(Scaled { from, to })) => {
                let text = match output {
                    Output::Text => format!("{provider}: {from} -> {to}\n"),
                    Output::Json => {
                        format!(
                            "{}\n",
                            json!({ "provider": provider, "from": from, "to": to })
                        )
                    }
                };
                std::io::stdout().write_all(text.as_bytes())?;
                return Ok(ExitCode::SUCCESS);
            }
            None => {}
        }
    }
    anyhow::bail!("the shim did not say whether Nomad has taken the size")
}

async fn list(client: &Client, output: Output) -> anyhow::Result<ExitCode> {
    let mut shim = RuntimeServiceClient::new(super::run::connect(&client.address).await?);
    let answer = tokio::time::timeout(super::run::CONNECT, shim.list_pools(ListPoolsRequest {}));
    let answer = answer
        .await?
        .map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    let answer = answer.into_inner();
    let mut text = String::new();
    if output == Output::Text {
        text.push_str(
            "PROVIDER    SLOTS  WARMING  IDLE  CLAIMED  RECYCLING  DRAINING  FAILED  ON-DEMAND\n",
        );
    }
    for pool in answer.pools {
        match output {
            Output::Text => text.push_str(&format!(
                "{:<10}  {:>5}  {:>7}  {:>4}  {:>7}  {:>9}  {:>8}  {:>6}  {:>9}\n",
                pool.provider,
                pool.slots,
                pool.warming,
                pool.idle,
                pool.claimed,
                pool.recycling,
                pool.draining,
                pool.failed,
                pool.on_demand
            )),
            Output::Json => {
                let line = json!({
                    "provider": pool.provider, "slots": pool.slots, "warming": pool.warming,
                    "idle": pool.idle, "claimed": pool.claimed, "recycling": pool.recycling,
                    "draining": pool.draining, "failed": pool.failed,
                    "on_demand": pool.on_demand,
                });
                text.push_str(&format!("{line}\n"));
            }
        }
    }
    if answer.nodes_unreachable > 0 {
        eprintln!(
            "{} nodes cannot be reached; their slots are not counted",
            answer.nodes_unreachable
        );
    }
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
