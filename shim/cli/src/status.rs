//! `polydev-shim status`

use std::process::ExitCode;

use polydev_proto::runtime::{Amount, GetClusterStatusRequest, Node};
use serde_json::{Value, json};

use super::{Options, Output, answer, print};

/// # Errors
/// If the shim cannot be reached, or refuses the call.
pub async fn execute(options: Options) -> anyhow::Result<ExitCode> {
    let mut shim = options.connect().await?;
    let status = answer(shim.get_cluster_status(GetClusterStatusRequest {})).await?;
    let mut text = String::new();
    if options.output == Output::Text {
        text.push_str(&format!(
            "{:<36}  {:<8}  {:>5}  {:>4}  {:>7}  {:>4}  {:<18}  OF\n",
            "NODE", "DRIVER", "SLOTS", "IDLE", "CLAIMED", "RUNS", "HEADROOM LEFT"
        ));
    }
    for node in &status.nodes {
        text.push_str(&match options.output {
            Output::Text => line(node),
            Output::Json => format!("{}\n", to_json(node)),
        });
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn line(node: &Node) -> String {
    if !node.reachable {
        return format!("{:<36}  cannot be reached\n", node.node_id);
    }
    let amount = |amount: &Option<Amount>| match amount {
        Some(Amount { cpu_mhz, memory_mb }) => format!("{cpu_mhz} MHz, {memory_mb} MiB"),
        None => "-".to_owned(),
    };
    format!(
        "{:<36}  {:<8}  {:>5}  {:>4}  {:>7}  {:>4}  {:<18}  {}\n",
        node.node_id,
        node.driver_version,
        node.slots,
        node.idle,
        node.claimed,
        node.runs,
        amount(&node.headroom_left),
        amount(&node.headroom),
    )
}

fn to_json(node: &Node) -> Value {
    let amount = |amount: &Option<Amount>| {
        let amount = amount.as_ref();
        amount.map(|amount| json!({ "cpu_mhz": amount.cpu_mhz, "memory_mb": amount.memory_mb }))
    };
    json!({
        "node_id": node.node_id, "reachable": node.reachable,
        "driver_version": node.driver_version, "slots": node.slots, "idle": node.idle,
        "claimed": node.claimed, "runs": node.runs, "run": amount(&node.run),
        "headroom": amount(&node.headroom), "headroom_left": amount(&node.headroom_left),
    })
}
