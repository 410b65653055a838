//! Removes a slot's containers.

use std::{sync::Arc, time::Duration};

use polydev_proto::id::Generation;
use polydev_transport::backoff::Backoff;
use tokio::time::{sleep, timeout};

use super::{Slot, Slots, fill::Container};
use crate::{
    docker::{self, removal::MAX_ATTEMPTS},
    identity::{LABEL_GENERATION, LABEL_INSTANCE, LABEL_SLOT},
    run::Run,
    site::Site,
};

/// How long removing all of a slot's containers may take.
const CLEAN_TIMEOUT: Duration = Duration::from_secs(60);
/// Between tries at what a slot needs.
pub(super) const BACKOFF: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(15));

/// Removes a container in which nothing runs any longer, then reports this to its run.
/// Retries as long as the slot lives; what a drained slot leaves is removed at the end.
pub(super) async fn remove(
    slots: Arc<Slots>,
    slot: Arc<Slot>,
    mut container: Container,
    run: Option<Arc<Run>>,
) {
    let mut backoff = BACKOFF;
    while let Err(error) = slots.site.docker.remove(&container.id).await {
        let error = crate::chain(&error);
        tracing::warn!(
            container = container.id,
            error,
            "cannot remove a container yet"
        );
        tokio::select! {
            () = sleep(backoff.next_wait()) => {}
            () = slot.drain.cancelled() => break,
        }
    }
    container.connection.listener.let_go();
    if let Some(run) = run {
        run.is_gone();
    }
}

/// Removes every container of the slot, or of one generation, whichever attempt or life of
/// the driver made it. Returns false if some may be left. The reaper removes them once the
/// slot has a later generation or has ended.
pub(super) async fn clean(slots: &Slots, slot: &Slot, generation: Option<Generation>) -> bool {
    let generation = generation.map(|generation| generation.to_string());
    let Site {
        docker, instance, ..
    } = &*slots.site;
    let clean = async {
        let slot_id = slot.identity.slot_id();
        for container in docker.list(LABEL_SLOT, slot_id.as_str()).await? {
            let label = |name: &str| container.labels.get(name);
            if label(LABEL_INSTANCE) == Some(instance)
                && (generation.is_none() || label(LABEL_GENERATION) == generation.as_ref())
            {
                docker.remove(&container.id).await?;
            }
        }
        Ok::<(), docker::Error>(())
    };
    match timeout(CLEAN_TIMEOUT, clean).await {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => {
            tracing::warn!(error = crate::chain(&error), "cannot clean a slot yet");
        }
        Err(_) => tracing::warn!("cannot clean a slot yet: Docker did not finish in time"),
    }
    false
}

/// Removes every container of a slot that starts or ends. If Docker cannot, the driver
/// retries for some minutes, as long as the allocation has no slot: a live slot cleans up
/// itself.
pub(super) async fn clean_at_last(slots: &Arc<Slots>, slot: &Arc<Slot>) {
    if clean(slots, slot, None).await {
        return;
    }
    let (slots, slot) = (slots.clone(), slot.clone());
    tokio::spawn(async move {
        let slot_id = slot.identity.slot_id();
        let mut backoff = BACKOFF;
        for _ in 0..MAX_ATTEMPTS {
            sleep(backoff.next_wait()).await;
            if slots.book.by_slot_id(&slot_id).is_some() || clean(&slots, &slot, None).await {
                return;
            }
        }
    });
}
