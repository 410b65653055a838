//! Orders slots from Nomad for one run each, when no slot is idle. An order dispatches a
//! parameterised job. The driver grants its slot only to that run.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use polydev_proto::{id::RunId, provider::Provider};
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

/// How long a run waits for a slot of the pool before it orders one.
const POOL_TIMEOUT: Duration = Duration::from_millis(500);
/// How long the run waits in addition to [`POOL_TIMEOUT`] while a slot is being filled for it: an
/// order would only slow this down.
const FILL_TIMEOUT: Duration = Duration::from_secs(3);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How often the shim tries to stop a job that the run no longer needs, or to find out whether the
/// job exists. A job that is left after this ends unused.
const MAX_TRIES: u32 = 5;

/// Orders slots, a limited number at a time; clones share the limit.
#[derive(Debug, Clone)]
pub struct OnDemand {
    nomad: Option<Nomad>,
    /// Permits for orders that wait, by provider: orders that fail do not delay those of other
    /// providers.
    waiting: Arc<BTreeMap<&'static str, Semaphore>>,
}

/// One run's order. Drop withdraws it.
#[derive(Debug)]
pub struct Order {
    progress: watch::Receiver<Progress>,
    used: Option<oneshot::Sender<()>>,
}

#[derive(Debug, Default)]
struct Progress {
    /// The state of the order, for people.
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

    /// Orders a slot for a run that still waits after a moment, as soon as its user may have
    /// another active run.
    #[must_use]
    pub fn order(
        &self,
        view: View,
        provider: Provider,
        run_id: RunId,
        mut place: watch::Receiver<Place>,
    ) -> Order {
        let (tell, progress) = watch::channel(Progress::default());
        let (used, mut is_used) = oneshot::channel();
        if let Some(nomad) = self.nomad.clone() {
            let waiting = self.waiting.clone();
            let ordered = async move {
                let turn = async {
                    // The sender is dropped when the run has a slot to try. The run may then run.
                    let may_run = |place: &Place| !matches!(place, Place::Held(_));
                    drop(place.wait_for(may_run).await);
                    sleep(POOL_TIMEOUT).await;
                    let coming = none_coming(&view, provider, &place);
                    let _enough = timeout(FILL_TIMEOUT, coming).await;
                    let turns = waiting
                        .get(provider.name())
                        .expect("every provider has some");
                    turns.acquire().await.expect("it is never closed")
                };
                let turn = tokio::select! {
                    turn = turn => turn,
                    _ = &mut is_used => return,
                };
                // Not cancelled: nobody would stop a job that nobody knows.
                let Some(job) = dispatch(&nomad, provider, run_id, &tell).await else {
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
    /// Keeps the order from being withdrawn: the run is on its way to the slot, and the job ends
    /// with the run or by itself. Returns when Nomad was asked, if this order asked it.
    pub fn used(mut self) -> Option<Instant> {
        if let Some(used) = self.used.take() {
            let _gone = used.send(());
        }
        self.progress.borrow().dispatched
    }

    /// The state of the order, for people; empty if nothing was ordered.
    #[must_use]
    pub fn told(&self) -> String {
        self.progress.borrow().told.clone()
    }
}

fn say(tell: &Tell, words: String) {
    tell.send_modify(|progress| progress.told = words);
}

/// Waits until no slot that is being filled is left for this run: the runs ahead need them all.
async fn none_coming(view: &View, provider: Provider, place: &watch::Receiver<Place>) {
    let mut changes = view.changes();
    loop {
        changes.mark_unchanged();
        let pool = view.counts().get(provider.name()).copied();
        let coming = pool.map_or(0, |pool| pool.warming + pool.recycling);
        let before = match *place.borrow() {
            Place::Next | Place::Evicted => 0,
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

/// The dispatched job, as soon as Nomad answers; `None` if no job will be dispatched.
async fn dispatch(nomad: &Nomad, provider: Provider, run_id: RunId, tell: &Tell) -> Option<String> {
    let job = job(provider);
    let text = run_id.to_string();
    let meta = [("run_id", text.as_str())];
    // The token belongs to this order: a repeated call makes no second job. Another try of the run
    // has its own job, and may stop it.
    let token = format!("{run_id}.{:016x}", rand::random::<u64>());
    let mut tries_unwanted = 0;
    loop {
        match timeout(ANSWER_TIMEOUT, nomad.dispatch(&job, &meta, &token)).await {
            Ok(Ok(child)) => {
                tracing::info!(%run_id, job = child, "ordered a slot");
                tell.send_modify(|progress| progress.dispatched = Some(Instant::now()));
                say(tell, format!("a slot is ordered as `{child}`"));
                return Some(child);
            }
            Ok(Err(error)) if error.is_not_found() => {
                tracing::debug!(job, "cannot order a slot: Nomad has no such job");
                say(
                    tell,
                    format!("cannot order a slot: Nomad has no job `{job}`"),
                );
                return None;
            }
            Ok(Err(error)) => {
                let words = crate::chain(&error);
                tracing::warn!(%run_id, error = words, "cannot order a slot");
                say(tell, format!("cannot order a slot: {words}"));
                if error.is_refusal() {
                    return None;
                }
            }
            Err(_) => say(tell, "cannot order a slot: Nomad does not answer".into()),
        }
        // Nomad may have accepted an order without an answer. Such a job must be stopped.
        if tell.is_closed() {
            tries_unwanted += 1;
            if tries_unwanted == MAX_TRIES {
                return None;
            }
        }
        sleep(RETRY_INTERVAL).await;
    }
}

/// Reports the state of the slot's start until the slot has ended.
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
                tracing::debug!(job, error = crate::chain(&error), "cannot watch a job");
                sleep(RETRY_INTERVAL).await;
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
    for _ in 0..MAX_TRIES {
        let stopped = timeout(ANSWER_TIMEOUT, nomad.stop(job)).await;
        match stopped {
            Ok(Ok(())) => {
                tracing::info!(job, "stopped an ordered slot that is not needed");
                return;
            }
            Ok(Err(error)) if error.is_refusal() => {
                let error = crate::chain(&error);
                tracing::warn!(job, error, "cannot stop a slot that is not needed");
                return;
            }
            Ok(Err(_)) | Err(_) => sleep(RETRY_INTERVAL).await,
        }
    }
    tracing::warn!(
        job,
        "cannot stop a slot that is not needed: Nomad does not answer"
    );
}
