//! Removes this driver's containers that belong to nothing any longer, whatever left them.

use std::{
    collections::HashMap,
    iter,
    sync::Arc,
    time::{Duration, Instant},
};

use polydev_proto::id::Generation;
use tokio::time::sleep;

use crate::{
    docker,
    identity::{
        LABEL_GENERATION, LABEL_INSTANCE, LABEL_NETWORK, LABEL_SLOT, LABEL_START, LABEL_TASK,
    },
    sandbox::Networks,
    site::Site,
    slot::Slots,
    task::Tasks,
};

/// Delays before the first rounds: dockerd may still be creating what a dead driver
/// requested. The last one is for idle containers that Nomad has not asked for within a
/// minute.
const FIRST_SECONDS: [u64; 5] = [0, 2, 5, 20, 40];

/// The books that may know a container.
#[derive(Debug)]
pub(crate) struct Reaper {
    pub(crate) site: Arc<Site>,
    pub(crate) slots: Arc<Slots>,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) networks: Arc<Networks>,
}

/// Compares Docker with the books, forever. The first rounds are more frequent, because an
/// earlier life of the driver may have left something, and dockerd may still finish its
/// requests.
pub(crate) async fn run(reaper: Reaper) {
    let dangling = reaper.site.config.gc.dangling;
    if !dangling.enabled {
        return;
    }
    let mut strays = HashMap::new();
    let first = FIRST_SECONDS.map(Duration::from_secs);
    for pause in first.into_iter().chain(iter::repeat(dangling.period)) {
        sleep(pause).await;
        if let Err(error) = reap(&reaper, &mut strays).await {
            tracing::debug!(
                error = &error as &dyn std::error::Error,
                "cannot check for stray containers now"
            );
        }
    }
}

/// `strays` records since when each container has belonged to nothing: a container that is
/// just being made is in no book yet.
async fn reap(reaper: &Reaper, strays: &mut HashMap<String, Instant>) -> Result<(), docker::Error> {
    let site = &reaper.site;
    let dangling = site.config.gc.dangling;
    let listed = site.docker.list(LABEL_INSTANCE, &site.instance).await?;
    let mut still = HashMap::new();
    for container in listed
        .iter()
        .filter(|container| !is_known(reaper, container))
    {
        let since = strays
            .get(&container.id)
            .copied()
            .unwrap_or_else(Instant::now);
        if since.elapsed() < dangling.creation_grace && !is_left(site, container) {
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
        reaper.slots.idle.give_up(&container.id);
        if let Err(error) = site.docker.remove(&container.id).await {
            let error = crate::chain(&error);
            tracing::warn!(
                container = container.id,
                error,
                "cannot remove the container yet"
            );
            still.insert(container.id.clone(), since);
        }
    }
    *strays = still;
    Ok(())
}

/// Whether an earlier life of the driver left the container.
fn is_left(site: &Site, container: &docker::Listed) -> bool {
    let start = container.labels.get(LABEL_START);
    start.is_some_and(|start| *start != site.start_id)
}

fn is_known(reaper: &Reaper, container: &docker::Listed) -> bool {
    let Reaper {
        site,
        slots,
        tasks,
        networks,
    } = reaper;
    let label = |name: &str| container.labels.get(name);
    if let Some(task_id) = label(LABEL_TASK) {
        return tasks.book.get(task_id).is_some() || (!site.config.gc.container && !container.runs);
    }
    if let Some(slot_id) = label(LABEL_SLOT) {
        // Of the containers from an earlier life, a recovered slot takes the idle ones; the
        // rest are unused.
        if slots.runs.holds(&container.id) || slots.idle.holds(&container.id) {
            return true;
        }
        let Some(slot) = slots.book.by_slot_id(&slot_id.as_str().into()) else {
            return false;
        };
        let generation = label(LABEL_GENERATION)
            .and_then(|generation| generation.parse().ok())
            .map(Generation);
        // Checked after the books above: a container that they no longer hold is in use by
        // a slot.
        return slot.has(&container.id)
            || (!is_left(site, container) && generation >= Some(slot.life().generation()));
    }
    // Nomad requests an allocation's network before its tasks start, and keeps it after
    // they end.
    label(LABEL_NETWORK).is_some_and(|alloc_id| networks.holds(alloc_id))
}
