//! Removes containers that are ours and in no slot, whatever left them there.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::{MissedTickBehavior, interval};

use crate::{
    docker,
    node::Node,
    slot::{LABEL_INSTANCE, LABEL_SLOT},
};

const EVERY: Duration = Duration::from_secs(60);
/// Nomad may take minutes to ask for a task after a restart, and what is not asked
/// for yet must not be taken away.
const GRACE: Duration = Duration::from_secs(5 * 60);

/// Compares Docker with the book, for ever.
pub(crate) async fn run(node: Arc<Node>) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut strays = HashMap::new();
    loop {
        ticks.tick().await;
        if let Err(error) = reap(&node, &mut strays).await {
            tracing::debug!(error = &error as &dyn std::error::Error, "cannot reap now");
        }
    }
}

/// `strays` remembers since when each has been in no slot.
async fn reap(node: &Node, strays: &mut HashMap<String, Instant>) -> Result<(), docker::Error> {
    let listed = node.docker.list(LABEL_INSTANCE, &node.instance).await?;
    let in_no_slot = |container: &&docker::Listed| {
        let slot_id = container.labels.get(LABEL_SLOT);
        slot_id.is_none_or(|slot_id| node.slots.by_slot_id(slot_id).is_none())
    };
    let mut still = HashMap::new();
    for container in listed.iter().filter(in_no_slot) {
        let since = strays
            .get(&container.id)
            .copied()
            .unwrap_or_else(Instant::now);
        if since.elapsed() < GRACE {
            still.insert(container.id.clone(), since);
            continue;
        }
        tracing::warn!(
            container = container.id,
            "removing a container that is in no slot"
        );
        node.docker.remove(&container.id).await?;
    }
    *strays = still;
    Ok(())
}
