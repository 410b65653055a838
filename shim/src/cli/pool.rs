//! `polydev-shim pool ...`

use std::process::ExitCode;

use polydev_proto::runtime::{ListPoolsRequest, runtime_service_client::RuntimeServiceClient};
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
}

pub(super) async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    let Command::List { client, output } = command;
    let mut shim = RuntimeServiceClient::new(super::run::connect(&client.address).await?);
    let answer = tokio::time::timeout(super::run::CONNECT, shim.list_pools(ListPoolsRequest {}));
    let answer = answer
        .await?
        .map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    let answer = answer.into_inner();
    let mut text = String::new();
    if output == Output::Text {
        text.push_str("PROVIDER    SLOTS  WARMING  IDLE  CLAIMED  RECYCLING  DRAINING  FAILED\n");
    }
    for pool in answer.pools {
        match output {
            Output::Text => text.push_str(&format!(
                "{:<10}  {:>5}  {:>7}  {:>4}  {:>7}  {:>9}  {:>8}  {:>6}\n",
                pool.provider,
                pool.slots,
                pool.warming,
                pool.idle,
                pool.claimed,
                pool.recycling,
                pool.draining,
                pool.failed
            )),
            Output::Json => {
                let line = json!({
                    "provider": pool.provider, "slots": pool.slots, "warming": pool.warming,
                    "idle": pool.idle, "claimed": pool.claimed, "recycling": pool.recycling,
                    "draining": pool.draining, "failed": pool.failed,
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
    use std::io::Write;
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
