//! The task that owns one slot: it alone drives the slot from state to state.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use polydev_proto::init::{Release, to_init};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Granted, Slot,
    claim::{Claim, Refusal},
    fill::{self, Container},
    headroom::Amount,
    run,
    state::{Event, Life},
};
use crate::{backoff::backoff, config, identity::Identity, limits::Limits, node::Node};

/// Containers in a row that may fail before the slot is given up and Nomad decides.
const FAILURES: u32 = 6;
/// A container that idled for so long was a good one, however it ended.
const STABLE: Duration = Duration::from_secs(60);

/// How often to look whether an image that is left alone is another by now.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How a slot ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Stopped,
    /// It could not be kept filled.
    Failed { reason: String },
}

impl Slot {
    /// Starts keeping a slot. `ready` answers when it is idle for the first time, or
    /// with the reason why it will never be; in that case nothing is left of it.
    pub(crate) fn start(
        node: &Arc<Node>,
        identity: Identity,
        config: config::Slot,
        idle: Limits,
    ) -> (Arc<Self>, oneshot::Receiver<Result<(), fill::Error>>) {
        // One claim can be granted before the keeper takes it, and no second one.
        let (claims, granted) = mpsc::channel(1);
        let (ready, is_ready) = oneshot::channel();
        let now = std::time::SystemTime::now();
        let slot = Arc::new(Self {
            identity,
            config,
            idle,
            started: now,
            life: Life::new(now).into(),
            claims,
            drain: CancellationToken::new(),
            kill: CancellationToken::new(),
            end: watch::Sender::new(None),
            container: Default::default(),
            changed: node.slots.changes(),
        });
        let keeper = Keeper {
            node: node.clone(),
            slot: slot.clone(),
            granted,
            failures: 0,
        };
        node.tasks.spawn(keeper.keep(ready));
        (slot, is_ready)
    }

    /// Hands a claim to the slot, or says why not. What becomes of it is told
    /// through its own queue of events.
    ///
    /// # Errors
    /// [`Refusal`]: nothing of it runs.
    pub(crate) fn claim(&self, node: &Node, generation: u64, claim: Claim) -> Result<(), Refusal> {
        let needed = Amount::on_top(&node.config.run, &self.idle);
        let room = || node.headroom.take(needed);
        let share = self.grant(generation, &claim.run_id, room)?;
        let granted = Granted { claim, share };
        self.claims.try_send(granted).map_err(|_| Refusal::Broken {
            reason: "the slot has ended".into(),
        })
    }
}

struct Keeper {
    node: Arc<Node>,
    slot: Arc<Slot>,
    granted: mpsc::Receiver<Granted>,
    /// Containers that failed since the last good one.
    failures: u32,
}

impl Keeper {
    async fn keep(mut self, ready: oneshot::Sender<Result<(), fill::Error>>) {
        let mut ready = Some(ready);
        let image = self.slot.config.image.clone();
        // Leftovers of an earlier life of the driver, or of this task's last start.
        self.clean().await;
        let end = loop {
            let filled = fill::fill(&self.node, &self.slot).await;
            if self.slot.drain.is_cancelled() {
                break Ended::Stopped;
            }
            let failure = match filled {
                Ok(container) => {
                    let image_id = container.image_id.clone();
                    self.slot.apply(Event::Warmed);
                    if let Some(ready) = ready.take() {
                        self.announce();
                        let _agent_gone = ready.send(Ok(()));
                    }
                    let served = self.serve(container).await;
                    if self.slot.drain.is_cancelled() {
                        break Ended::Stopped;
                    }
                    self.slot.apply(Event::Recycled);
                    let breakers = &self.node.breakers;
                    match &served {
                        Ok(()) => breakers.worked(&image),
                        Err(reason) => breakers.failed(&image, &image_id, reason, Instant::now()),
                    }
                    served
                }
                Err(error) => {
                    self.clean().await;
                    let reason = crate::chain(&error);
                    // Nomad has a slot for a running one if nobody waits for its start.
                    if let Some(ready) = ready.take_if(|ready| !ready.is_closed()) {
                        let _agent_gone = ready.send(Err(error));
                        break self.give_up(reason);
                    }
                    if let fill::Error::Open(open) = error {
                        self.slot.apply(Event::Held { reason });
                        let wait = open.retry_in.min(LOOK_AGAIN);
                        if self.rest(wait.mul_f64(rand::random_range(0.5..1.0))).await {
                            continue;
                        }
                        break Ended::Stopped;
                    }
                    Err(reason)
                }
            };
            match failure {
                Ok(()) => self.failures = 0,
                Err(reason) => {
                    self.failures += 1;
                    let (slot, failures) = (self.slot.identity.slot_id(), self.failures);
                    tracing::warn!(slot, failures, reason, "a slot lost its container");
                    if self.failures >= FAILURES {
                        break self.give_up(reason);
                    }
                    if !self.rest(backoff(self.failures)).await {
                        break Ended::Stopped;
                    }
                }
            }
        };
        self.clean().await;
        self.slot.end.send_replace(Some(end));
    }

    /// False if the slot is not wanted any more.
    async fn rest(&self, time: Duration) -> bool {
        tokio::select! {
            () = sleep(time) => true,
            () = self.slot.drain.cancelled() => false,
        }
    }

    fn give_up(&self, reason: String) -> Ended {
        let given_up = Event::GivenUp {
            reason: reason.clone(),
        };
        self.slot.apply(given_up);
        Ended::Failed { reason }
    }

    /// Waits with an idle container until it is claimed, dies or is not wanted any
    /// more; then serves the claim, and destroys the container. An error is the reason
    /// why the container died without having been of use.
    async fn serve(&mut self, mut container: Container) -> Result<(), String> {
        self.slot.hold(Some(container.limits.clone()));
        let idle_since = Instant::now();
        // Held until the container is gone, for it is what the share stands for.
        let mut _share = None;
        let died = loop {
            tokio::select! {
                biased;
                Some(Granted { claim, share }) = self.granted.recv() => {
                    _share = Some(share);
                    self.run(&mut container, claim).await;
                    break None;
                }
                // Init has nothing to say while it waits.
                message = container.link.reader.next() => {
                    let reason = message.err().map_or_else(
                        || "init spoke out of turn".to_owned(),
                        |error| crate::chain(&error),
                    );
                    break Some(format!("its idle container died: {reason}"));
                }
                () = self.slot.drain.cancelled() => {
                    // A claim that was granted just before the drain is still served.
                    if !self.slot.is_claimed() {
                        break None;
                    }
                }
            }
        };
        if let Some(reason) = &died {
            self.slot.apply(Event::Died {
                reason: reason.clone(),
            });
            // A claim that was granted meanwhile is on its way here, if not here already.
            if self.slot.is_claimed()
                && let Some(Granted { claim, .. }) = self.granted.recv().await
            {
                let broken = Refusal::Broken {
                    reason: reason.clone(),
                };
                let _gone = claim.events.try_send(Err(broken));
                self.slot.apply(Event::RunEnded);
            }
        } else {
            let released = to_init::Message::Release(Release {});
            let _gone = container.link.writer.send(released).await;
        }
        self.slot.hold(None);
        self.remove(&container.id).await;
        match died {
            Some(reason) if idle_since.elapsed() < STABLE => Err(reason),
            _ => Ok(()),
        }
    }

    /// Does not give up while the slot lives: the next container must not stand beside
    /// one that still runs. What a drained slot leaves is the reaper's.
    async fn remove(&self, id: &str) {
        let mut failures = 0;
        while let Err(error) = self.node.docker.remove(id).await {
            failures += 1;
            tracing::warn!(
                container = id,
                error = crate::chain(&error),
                "cannot remove a container yet"
            );
            tokio::select! {
                () = sleep(backoff(failures)) => {}
                () = self.slot.drain.cancelled() => return,
            }
        }
    }

    async fn run(&self, container: &mut Container, claim: Claim) {
        let limits = self.node.config.run;
        // Docker learns of the raised limits while the command already runs.
        let (docker, id) = (self.node.docker.clone(), container.id.clone());
        let update = async move {
            if let Err(error) = docker.update(&id, &limits).await {
                // The container of a short run is gone by now.
                tracing::debug!(error = &error as &dyn std::error::Error, "limits not told");
            }
        };
        let serve = run::serve(container, claim, &limits, &self.slot.kill);
        let update = self.node.tasks.spawn(async {
            sleep(TELL_DOCKER_AFTER).await;
            update.await;
        });
        serve.await;
        update.abort();
        self.slot.apply(Event::RunEnded);
    }

    fn announce(&self) {
        let Slot {
            identity,
            config,
            idle,
            ..
        } = &*self.slot;
        let run = self.node.config.run;
        let message = format!(
            "Warm: image {}, idle {idle}; a run gets {run}",
            config.image
        );
        self.node.events.send(identity, message);
    }

    async fn clean(&self) {
        let cleaned = timeout(Duration::from_secs(60), fill::clean(&self.node, &self.slot)).await;
        if let Ok(Err(error)) = cleaned {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "cannot clean a slot, the reaper will");
        }
    }
}

/// A run that is over by then is not worth dockerd's time; `docker inspect` is
/// right for every run that somebody could look at.
const TELL_DOCKER_AFTER: Duration = Duration::from_millis(200);
