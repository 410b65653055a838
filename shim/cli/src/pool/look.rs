//! `polydev-shim pool list|show|watch`

use std::io::IsTerminal;

use polydev_proto::runtime::{
    GetPoolRequest, ListPoolsRequest, Pool, Slot, SlotState, WatchPoolsRequest,
};
use serde_json::{Value, json};

use crate::{Options, Output, age, answer, print, told};

/// Characters of an id in a table, as in Nomad's own tables.
const SHORT: usize = 8;

pub(super) async fn list(options: &Options) -> anyhow::Result<()> {
    let mut shim = options.connect().await?;
    let answer = answer(shim.list_pools(ListPoolsRequest {})).await?;
    print(&pools(&answer.pools, options.output))?;
    unreachable_nodes(answer.nodes_unreachable);
    Ok(())
}

pub(super) async fn show(options: &Options, provider: String) -> anyhow::Result<()> {
    let mut shim = options.connect().await?;
    let slots = answer(shim.get_pool(GetPoolRequest { provider }))
        .await?
        .slots;
    let mut text = String::new();
    if options.output == Output::Text {
        text.push_str("ALLOCATION  NODE      STATE      CAUSE        FOR    GENERATION  RUN                                   IMAGE\n");
    }
    for slot in &slots {
        text.push_str(&match options.output {
            Output::Text => slot_line(slot),
            Output::Json => format!("{}\n", slot_json(slot)),
        });
    }
    Ok(print(&text)?)
}

pub(super) async fn watch(options: &Options) -> anyhow::Result<()> {
    let mut shim = options.connect().await?;
    let mut changes = answer(shim.watch_pools(WatchPoolsRequest {})).await?;
    let redraws = options.output == Output::Text && std::io::stdout().is_terminal();
    while let Some(now) = changes.message().await.map_err(told)? {
        // Replaces the previous table, as `watch` does.
        let clear = if redraws { "\x1b[H\x1b[J" } else { "" };
        print(&format!("{clear}{}", pools(&now.pools, options.output)))?;
        unreachable_nodes(now.nodes_unreachable);
    }
    anyhow::bail!("the shim ended the stream")
}

fn unreachable_nodes(count: u32) {
    if count > 0 {
        eprintln!("{count} nodes cannot be reached; their slots are not counted");
    }
}

fn pools(pools: &[Pool], output: Output) -> String {
    let mut text = String::new();
    if output == Output::Text {
        text.push_str(
            "PROVIDER    SLOTS  WARMING  IDLE  LEASED  CLAIMED  RECYCLING  DRAINING  FAILED  ON-DEMAND\n",
        );
    }
    for pool in pools {
        match output {
            Output::Text => text.push_str(&format!(
                "{:<10}  {:>5}  {:>7}  {:>4}  {:>6}  {:>7}  {:>9}  {:>8}  {:>6}  {:>9}\n",
                pool.provider,
                pool.slots,
                pool.warming,
                pool.idle,
                pool.leased,
                pool.claimed,
                pool.recycling,
                pool.draining,
                pool.failed,
                pool.on_demand
            )),
            Output::Json => {
                let line = json!({
                    "provider": pool.provider, "slots": pool.slots, "warming": pool.warming,
                    "idle": pool.idle, "leased": pool.leased, "claimed": pool.claimed,
                    "recycling": pool.recycling, "draining": pool.draining, "failed": pool.failed,
                    "on_demand": pool.on_demand,
                });
                text.push_str(&format!("{line}\n"));
            }
        }
    }
    text
}

fn slot_line(slot: &Slot) -> String {
    let short = |id: &str| id.chars().take(SHORT).collect::<String>();
    let allocation = slot.slot_id.rsplit('/').next().unwrap_or_default();
    let mut line = format!(
        "{:<10}  {:<8}  {:<9}  {:<11}  {:<5}  {:>10}  {:<36}  {}",
        short(allocation),
        short(&slot.node_id),
        state(slot),
        slot.cause,
        age(slot.since),
        slot.generation,
        if slot.run_id.is_empty() {
            "-"
        } else {
            &slot.run_id
        },
        slot.image,
    );
    if slot.on_demand {
        line.push_str("  (on demand)");
    }
    if slot.agent {
        line.push_str("  (agent)");
    }
    if !slot.agent_reason.is_empty() {
        line.push_str(&format!("  no agent: {}", slot.agent_reason));
    }
    if !slot.reason.is_empty() {
        line.push_str(&format!("  {}", slot.reason));
    }
    line + "\n"
}

fn slot_json(slot: &Slot) -> Value {
    json!({
        "slot_id": slot.slot_id, "node_id": slot.node_id, "job_id": slot.job_id,
        "state": state(slot), "since": slot.since.as_ref().map(ToString::to_string),
        "cause": slot.cause, "reason": slot.reason, "generation": slot.generation, "image": slot.image,
        "run_id": slot.run_id, "on_demand": slot.on_demand, "agent": slot.agent,
        "agent_reason": slot.agent_reason,
    })
}

/// The state's name in drivers, logs and metrics.
fn state(slot: &Slot) -> String {
    let name = SlotState::try_from(slot.state).map_or("", |state| state.as_str_name());
    name.trim_start_matches("SLOT_STATE_").to_lowercase()
}
