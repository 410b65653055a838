//! Removes containers that are ours and belong to nothing any more, whatever left them.

use std::{
    collections::HashMap,
    iter,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::sleep;

use crate::{
    backoff::backoff,
    docker,
    identity::{
        LABEL_GENERATION, LABEL_INSTANCE, LABEL_NETWORK, LABEL_SLOT, LABEL_START, LABEL_TASK,
    },
    node::Node,
};

/// Attempts to remove one container, over some minutes; the rounds below come after them.
pub(crate) const ATTEMPTS: u32 = 20;
/// Before the first rounds: dockerd may still be making what a dead driver asked it for. The last
/// is for idle containers that Nomad has not asked for within a minute.
const FIRST_SECONDS: [u64; 5] = [0, 2, 5, 20, 40];

/// Removes a container that is of no more use, or, while Docker cannot, sees to it that it
/// will be.
pub(crate) async fn remove(node: &Arc<Node>, container: &str) {
    let Err(error) = node.docker.remove(container).await else {
        return;
    };
    tracing::warn!(
        container,
        error = crate::chain(&error),
        "cannot remove a container yet"
    );
    let (node, container) = (node.clone(), container.to_owned());
    tokio::spawn(async move {
        for failures in 0..ATTEMPTS {
            sleep(backoff(failures)).await;
            if node.docker.remove(&container).await.is_ok() {
                return;
            }
        }
    });
}

/// Removes a container of this name should Docker still come to make it: it was asked to,
/// and has not answered.
pub(crate) fn remove_if_made(node: &Arc<Node>, name: &str) {
    let (node, name) = (node.clone(), name.to_owned());
    tokio::spawn(async move {
        for attempts in 0..ATTEMPTS {
            // That there is none yet says nothing.
            let _done_or_not = node.docker.remove(&name).await;
            sleep(backoff(attempts)).await;
        }
    });
}

/// Compares Docker with the books, for ever; several times at first, when an earlier life of
/// the driver may have left something, or may still come to.
pub(crate) async fn run(node: Arc<Node>) {
    let dangling = node.config.gc.dangling;
    if !dangling.enabled {
        return;
    }
    let mut strays = HashMap::new();
    let first = FIRST_SECONDS.map(Duration::from_secs);
    for pause in first.into_iter().chain(iter::repeat(dangling.period)) {
        sleep(pause).await;
        if let Err(error) = reap(&node, &mut strays).await {
            tracing::debug!(error = &error as &dyn std::error::Error, "cannot reap now");
        }
    }
}

/// `strays` remembers since when each has belonged to nothing: what is just being made is
/// in no book yet.
async fn reap(node: &Node, strays: &mut HashMap<String, Instant>) -> Result<(), docker::Error> {
    let dangling = node.config.gc.dangling;
    let listed = node.docker.list(LABEL_INSTANCE, &node.instance).await?;
    let mut still = HashMap::new();
    for container in listed.iter().filter(|container| !is_known(node, container)) {
        let since = strays
            .get(&container.id)
            .copied()
            .unwrap_or_else(Instant::now);
        if since.elapsed() < dangling.creation_grace && !is_left(node, container) {
            still.insert(container.id.clone(), since);
            continue;
        }
        let names = container.names.join(" ");
        if dangling.dry_run {
            tracing::warn!(
                container = container.id,
                names,
                "would remove a container that belongs to nothing"
            );
            still.insert(container.id.clone(), since);
            continue;
        }
        tracing::warn!(
            container = container.id,
            names,
            "removing a container that belongs to nothing"
        );
        node.idle.give_up(&container.id);
        if let Err(error) = node.docker.remove(&container.id).await {
            let error = crate::chain(&error);
            tracing::warn!(container = container.id, error, "it stays for now");
            still.insert(container.id.clone(), since);
        }
    }
    *strays = still;
    Ok(())
}

/// Whether an earlier life of the driver left it.
fn is_left(node: &Node, container: &docker::Listed) -> bool {
    let start = container.labels.get(LABEL_START);
    start.is_some_and(|start| *start != node.start_id)
}

fn is_known(node: &Node, container: &docker::Listed) -> bool {
    let label = |name: &str| container.labels.get(name);
    if let Some(task_id) = label(LABEL_TASK) {
        return node.plain.get(task_id).is_some() || (!node.config.gc.container && !container.runs);
    }
    if let Some(slot_id) = label(LABEL_SLOT) {
        // Of what an earlier life left, a slot that Nomad asks for takes up what was idle, and
        // nobody uses the rest.
        if node.runs.holds(&container.id) || node.idle.holds(&container.id) {
            return true;
        }
        let Some(slot) = node.slots.by_slot_id(slot_id) else {
            return false;
        };
        let generation = label(LABEL_GENERATION).and_then(|generation| generation.parse().ok());
        // Asked after the above: what is no longer held has been taken up.
        return slot.has(&container.id)
            || (!is_left(node, container) && generation >= Some(slot.life().generation()));
    }
    // Nomad asks for an allocation's network before its tasks, and keeps it after them.
    label(LABEL_NETWORK).is_some_and(|alloc_id| node.networks.holds(alloc_id))
}
