//! Slots that are ordered from Nomad for one run each, when none is idle: dispatches of a
//! parameterised job, which its driver grants to that run alone.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use polydev_proto::provider::Provider;
use tokio::{
    sync::{Semaphore, oneshot, watch},
    time::{sleep, timeout},
};
use tracing::Instrument;

use super::queue::Place;
use crate::{
    nomad::{Nomad, job::Allocation},
    pool::View,
};

/// For a slot of the pool to become idle.
const PATIENCE: Duration = Duration::from_millis(500);
/// The same if one is being filled for the run: an order would only slow that down.
const PATIENCE_MOST: Duration = Duration::from_secs(3);
const ANSWER: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(1);
/// Once the run does not need it: tries to stop a job, or to learn whether there is one. What
/// is left then ends unused.
const STOPS: u32 = 5;

/// Orders slots, so many at a time; clones share the number.
#[derive(Debug, Clone)]
pub struct OnDemand {
    nomad: Option<Nomad>,
    /// Orders that may wait, by provider: those of one that fail hold no other's up.
    waiting: Arc<BTreeMap<&'static str, Semaphore>>,
}

/// One run's order. When it is dropped the slot is not needed any more.
#[derive(Debug)]
pub struct Order {
    progress: watch::Receiver<Progress>,
    used: Option<oneshot::Sender<()>>,
}

#[derive(Debug, Default)]
struct Progress {
    /// For people.
    told: String,
    dispatched: Option<Instant>,
}

type Tell = watch::Sender<Progress>;

impl OnDemand {
    /// Without `nomad` nothing is ordered. At most `most` slots of a provider are on order at
    /// a time.
    #[must_use]
    pub fn new(nomad: Option<Nomad>, most: usize) -> Self {
        Self {
            nomad: nomad.filter(|_| most > 0),
            waiting: Arc::new(
                Provider::all()
                    .map(|provider| (provider.name(), Semaphore::new(most)))
                    .collect(),
            ),
        }
    }

    /// Orders a slot for a run that still waits after a moment, once its user may have
    /// another run.
    #[must_use]
    pub fn order(
        &self,
        view: View,
        provider: Provider,
        run_id: String,
        mut place: watch::Receiver<Place>,
    ) -> Order {
        let (tell, progress) = watch::channel(Progress::default());
        let (used, mut is_used) = oneshot::channel();
        if let Some(nomad) = self.nomad.clone() {
            let waiting = self.waiting.clone();
            let ordered = async move {
                let turn = async {
                    // Its sender goes when the run has a slot to try: it may run then.
                    let may_run = |place: &Place| !matches!(place, Place::Held(_));
                    drop(place.wait_for(may_run).await);
                    sleep(PATIENCE).await;
                    let coming = none_coming(&view, provider, &place);
                    let _enough = timeout(PATIENCE_MOST, coming).await;
                    let turns = waiting
                        .get(provider.name())
                        .expect("every provider has some");
                    turns.acquire().await.expect("it is never closed")
                };
                let turn = tokio::select! {
                    turn = turn => turn,
                    _ = &mut is_used => return,
                };
                // To its end: a job that nobody knows of would not be stopped.
                let Some(job) = dispatch(&nomad, provider, &run_id, &tell).await else {
                    return;
                };
                let used = tokio::select! {
                    used = &mut is_used => used,
                    () = watch_start(&nomad, &job, &tell) => {
                        drop(turn);
                        is_used.await
                    }
                };
                if used.is_err() {
                    stop(&nomad, &job).await;
                }
            };
            tokio::spawn(ordered.in_current_span());
        }
        Order {
            progress,
            used: Some(used),
        }
    }
}

impl Order {
    /// The run is on its way to its slot, and the job ends with it, or by itself: nothing is
    /// withdrawn any more. When Nomad was told, if by this order.
    pub fn used(mut self) -> Option<Instant> {
        if let Some(used) = self.used.take() {
            let _gone = used.send(());
        }
        self.progress.borrow().dispatched
    }

    /// How it goes, for people; empty if nothing was ordered.
    #[must_use]
    pub fn told(&self) -> String {
        self.progress.borrow().told.clone()
    }
}

fn say(tell: &Tell, words: String) {
    tell.send_modify(|progress| progress.told = words);
}

/// Waits until fewer slots are being filled than runs wait before this one.
async fn none_coming(view: &View, provider: Provider, place: &watch::Receiver<Place>) {
    let mut changes = view.changes();
    loop {
        changes.mark_unchanged();
        let pool = view.counts().get(provider.name()).copied();
        let coming = pool.map_or(0, |pool| pool.warming + pool.recycling);
        let before = match *place.borrow() {
            Place::Next => 0,
            Place::Behind(before) | Place::Held(before) => before,
        };
        if coming as usize <= before || changes.changed().await.is_err() {
            return;
        }
    }
}

fn job(provider: Provider) -> String {
    format!("polydev-on-demand-{}", provider.name())
}

/// The dispatched job, as soon as Nomad answers; `None` if it will not be.
async fn dispatch(nomad: &Nomad, provider: Provider, run_id: &str, tell: &Tell) -> Option<String> {
    let job = job(provider);
    let meta = [("run_id", run_id)];
    // Of this order: a repeated call makes no second job, and another try of the run has one
    // of its own, which it may stop.
    let token = format!("{run_id}.{:016x}", rand::random::<u64>());
    let mut tries_unwanted = 0;
    loop {
        match timeout(ANSWER, nomad.dispatch(&job, &meta, &token)).await {
            Ok(Ok(child)) => {
                tracing::info!(run_id, job = child, "a slot is ordered");
                tell.send_modify(|progress| progress.dispatched = Some(Instant::now()));
                say(tell, format!("a slot is ordered as `{child}`"));
                return Some(child);
            }
            Ok(Err(error)) if error.is_not_found() => {
                tracing::debug!(job, "without this job no slot is ordered");
                say(
                    tell,
                    format!("no slot can be ordered without the job `{job}`"),
                );
                return None;
            }
            Ok(Err(error)) => {
                let words = crate::chain(&error);
                tracing::warn!(run_id, error = words, "no slot is ordered");
                say(tell, format!("no slot could be ordered: {words}"));
                if error.is_refusal() {
                    return None;
                }
            }
            Err(_) => say(
                tell,
                "no slot could be ordered: Nomad does not answer".into(),
            ),
        }
        // One that got no answer may have been taken, and would have to be stopped.
        if tell.is_closed() {
            tries_unwanted += 1;
            if tries_unwanted == STOPS {
                return None;
            }
        }
        sleep(RETRY).await;
    }
}

/// Tells how the start of the slot goes, until there is nothing more to tell.
async fn watch_start(nomad: &Nomad, job: &str, tell: &Tell) {
    let mut index = 0;
    loop {
        match nomad.allocations(job, index).await {
            Ok((next, allocations)) => {
                index = next;
                let Some(allocation) = allocations.last() else {
                    say(tell, format!("Nomad has no room yet for `{job}`"));
                    continue;
                };
                let status = &allocation.client_status;
                let why = last_words(allocation);
                say(
                    tell,
                    format!("the slot ordered as `{job}` is {status}{why}"),
                );
                if !matches!(status.as_str(), "pending" | "running") {
                    tracing::warn!(job, status, why, "a slot on demand has ended");
                    return;
                }
            }
            Err(error) => {
                tracing::debug!(job, error = crate::chain(&error), "cannot be watched");
                sleep(RETRY).await;
            }
        }
    }
}

fn last_words(allocation: &Allocation) -> String {
    let tasks = allocation.task_states.iter().flatten();
    let mut events = tasks.flat_map(|(_, task)| &task.events).rev();
    let failure = events.find(|event| event.r#type.contains("Failure"));
    failure.map_or_else(String::new, |event| format!(": {}", event.display_message))
}

async fn stop(nomad: &Nomad, job: &str) {
    for _ in 0..STOPS {
        let stopped = timeout(ANSWER, nomad.stop(job)).await;
        match stopped {
            Ok(Ok(())) => {
                tracing::info!(job, "a slot that was ordered is not needed");
                return;
            }
            Ok(Err(error)) if error.is_refusal() => {
                let error = crate::chain(&error);
                tracing::warn!(job, error, "a slot that is not needed stays");
                return;
            }
            Ok(Err(_)) | Err(_) => sleep(RETRY).await,
        }
    }
    tracing::warn!(
        job,
        "Nomad does not answer: a slot that is not needed stays"
    );
}
