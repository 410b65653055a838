//! The node's slots for a shim that watches: first all of them, then each change.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{Stream, stream};
use polydev_proto::{
    budget::Used,
    id::UserId,
    node::{Slot as SlotMessage, Spent as SpentMessage, WatchSlotsResponse},
};
use prost_types::Timestamp;
use tokio::{sync::watch, time::timeout};

use super::encode_slot;
use crate::slot::Slots;

/// How often a shim receives the time if nothing else happens. Claims are dated by this
/// driver's clock, and the shim's own clock may stop while the machine sleeps.
const CLOCK_INTERVAL: Duration = Duration::from_secs(5);

/// All slots that have not ended, and then each change.
pub(super) fn watch(slots: Arc<Slots>) -> impl Stream<Item = WatchSlotsResponse> + Send {
    let watcher = Watcher {
        changes: slots.book.changes().subscribe(),
        slots,
        sent: None,
        spent: Default::default(),
    };
    stream::unfold(watcher, |mut watcher| async move {
        let response = watcher.next().await?;
        Some((response, watcher))
    })
}

struct Watcher {
    slots: Arc<Slots>,
    changes: watch::Receiver<u64>,
    /// What the shim already has, so that only differences are sent; `None` before the
    /// snapshot.
    sent: Option<HashMap<String, SlotMessage>>,
    /// What it knows of what users have used, and of which day.
    spent: (u64, BTreeMap<UserId, Used>),
}

impl Watcher {
    /// `None` once nothing can change any longer.
    async fn next(&mut self) -> Option<WatchSlotsResponse> {
        if self.sent.is_some()
            && let Ok(Err(_)) = timeout(CLOCK_INTERVAL, self.changes.changed()).await
        {
            return None;
        }
        self.changes.mark_unchanged();
        let slots = self.slots.book.all();
        let slots = slots.iter().filter(|slot| slot.end().is_none());
        let broker_key = self.slots.site.broker.public_key();
        let encode = |slot| SlotMessage {
            broker_key: broker_key.clone(),
            ..encode_slot(slot)
        };
        let now: HashMap<_, _> = slots
            .map(|slot| (slot.identity.slot_id().into(), encode(slot)))
            .collect();
        let snapshot = self.sent.is_none();
        let sent = self.sent.take().unwrap_or_default();
        let response = WatchSlotsResponse {
            start_id: self.slots.site.start_id.clone(),
            now: Some(Timestamp::from(SystemTime::now())),
            since: Some(Timestamp::from(self.slots.runs.since())),
            snapshot,
            slots: now
                .values()
                .filter(|slot| sent.get(&slot.slot_id) != Some(slot))
                .cloned()
                .collect(),
            removed: sent
                .into_keys()
                .filter(|id| !now.contains_key(id))
                .collect(),
            spent: self.spent(),
            node_identity: self.slots.site.identity.clone(),
        };
        self.sent = Some(now);
        Some(response)
    }

    /// What users have used, as far as the shim does not know it.
    fn spent(&mut self) -> Vec<SpentMessage> {
        let (day, now) = self.slots.runs.spent.today();
        let (of, told) = &self.spent;
        let is_new =
            |(user_id, used): &(&UserId, &Used)| *of != day || told.get(*user_id) != Some(*used);
        let encode = |(user_id, used): (&UserId, &Used)| SpentMessage {
            user_id: user_id.clone().into(),
            day,
            requests: used.requests,
            tokens: used.tokens,
        };
        let new = now.iter().filter(is_new).map(encode).collect();
        self.spent = (day, now);
        new
    }
}
