//! The task that owns one slot and drives it from state to state.

mod idle;

use std::{
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use polydev_proto::id::Generation;
use polydev_transport::backoff::Backoff;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{
    Claim, Slot, Slots, adopt,
    ahead::{Ahead, LONG_RUN},
    boost::{self, Boosted},
    clear::{self, BACKOFF},
    fill::{self, Container},
    shelf::Idle,
};
use crate::{
    config,
    identity::Identity,
    life::{Event, Life},
    limits::Limits,
    run::{
        Run,
        carry::{self, Order},
        claim::Refusal,
    },
};

/// Consecutive failed containers after which the slot is given up, and Nomad decides.
const MAX_FAILURES: u32 = 6;
/// A container that idled for this long counts as good, however it ended.
const MIN_IDLE_TIME: Duration = Duration::from_secs(60);

/// How often to check whether a paused image has changed.
const IMAGE_INTERVAL: Duration = Duration::from_secs(5);

/// How often to check whether Docker is back.
const DOCKER_INTERVAL: Duration = Duration::from_secs(2);

/// How a slot ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// It was told to stop.
    Stopped,
    /// It could not be kept filled.
    Failed { reason: String },
}

impl Slot {
    /// Starts to keep a slot once it is [wanted](Slot::want). `ready` reports that the slot
    /// is idle for the first time, or why it never will be; then nothing of it is left.
    pub(crate) fn start(
        slots: &Arc<Slots>,
        identity: Identity,
        config: config::Slot,
        idle: Limits,
    ) -> (Arc<Self>, oneshot::Receiver<Result<(), fill::Error>>) {
        // The keeper takes one granted claim; there is no second one.
        let (claims, granted) = mpsc::channel(1);
        let (ready, is_ready) = oneshot::channel();
        let now = SystemTime::now();
        // From an earlier life of the driver.
        let slot_id = identity.slot_id();
        let open = slots.runs.open_in(&slot_id);
        let last = slots.runs.last_generation(&slot_id);
        let left = slots.idle.ask(&slot_id);
        let left = left.filter(|left| open.is_none() && left.generation > last);
        let generation = left.as_ref().map_or(last.next(), |left| left.generation);
        let life = Life::new(generation, config.run_id, now);
        let life = match &open {
            Some(run) => {
                let claimed = &run.claimed;
                life.resumed(claimed.holder(), claimed.generation, claimed.claimed_at)
            }
            None => life,
        };
        let slot = Arc::new(Self {
            identity,
            config,
            idle,
            started: now,
            life: life.into(),
            claims,
            wanted: CancellationToken::new(),
            drain: CancellationToken::new(),
            kill: CancellationToken::new(),
            end: watch::Sender::new(None),
            lease: Default::default(),
            container: Default::default(),
            steps: slots.steps.clone(),
            changed: slots.book.changes(),
        });
        let keeper = Keeper {
            slots: slots.clone(),
            slot: slot.clone(),
            granted,
            failures: 0,
            backoff: BACKOFF,
            next: None,
            removal: None,
        };
        let identity = &slot.identity;
        let span = tracing::info_span!("slot", slot_id = %identity.slot_id());
        let kept = keeper.keep(open, left, ready).instrument(span);
        slots.site.background.spawn(kept);
        (slot, is_ready)
    }
}

struct Keeper {
    slots: Arc<Slots>,
    slot: Arc<Slot>,
    granted: mpsc::Receiver<Claim>,
    /// Failed containers since the last good one.
    failures: u32,
    /// Between those.
    backoff: Backoff,
    /// Prepared during the last run, or taken over.
    next: Option<Container>,
    /// The removal of the last container.
    removal: Option<JoinHandle<()>>,
}

/// The outcome of one container of the slot.
enum Outcome {
    /// It was useful, or its end was nobody's fault.
    Good,
    /// None was tried, which says nothing about the slot.
    Held,
    Failed {
        reason: String,
    },
}

type Ready = oneshot::Sender<Result<(), fill::Error>>;

impl Keeper {
    /// After a restart, `open` is the run that is still in the slot, with a carrier of its
    /// own, or `left` is the container that still idles in it.
    async fn keep(mut self, open: Option<Arc<Run>>, left: Option<Idle>, ready: Ready) {
        if !self.is_wanted().await {
            // A run that is still in the slot continues without it.
            if open.is_none() {
                if let Some(left) = left {
                    left.discard();
                }
                clear::clean_at_last(&self.slots, &self.slot).await;
            }
            return self.end(Ended::Stopped);
        }
        let had_run = open.is_some() || self.slot.life().generation() > Generation(1);
        self.take_up(open, left).await;
        if had_run && self.slot.is_on_demand() {
            return self.end(Ended::Stopped);
        }
        let mut ready = Some(ready);
        let end = loop {
            if let ControlFlow::Break(end) = self.turn(&mut ready).await {
                break end;
            }
        };
        self.removed().await;
        clear::clean_at_last(&self.slots, &self.slot).await;
        self.end(end);
    }

    /// Whether Nomad wants the slot to run; otherwise it wants to destroy it.
    async fn is_wanted(&self) -> bool {
        if !self.slot.wanted.is_cancelled() {
            let reason = "Nomad has recovered it and does not wait for it yet".into();
            self.slot.apply(Event::Held { reason });
        }
        tokio::select! {
            biased;
            () = self.slot.wanted.cancelled() => true,
            () = self.slot.drain.cancelled() => false,
        }
    }

    /// Handles what an earlier life of the driver, or this task's previous start, left.
    async fn take_up(&mut self, open: Option<Arc<Run>>, left: Option<Idle>) {
        if let Some(run) = open {
            self.wait_for(&run).await;
        }
        if let Some(left) = left {
            self.next = adopt::adopt(&self.slots, &self.slot, left).await;
        }
        if self.next.is_none() {
            clear::clean_at_last(&self.slots, &self.slot).await;
        }
    }

    /// Serves one container, from its creation to its end.
    async fn turn(&mut self, ready: &mut Option<Ready>) -> ControlFlow<Ended> {
        let generation = self.slot.life().generation();
        let filled = match self.next.take() {
            Some(container) => Ok(container),
            None => fill::fill(&self.slots, &self.slot, generation).await,
        };
        if self.slot.drain.is_cancelled() {
            return ControlFlow::Break(Ended::Stopped);
        }
        let outcome = match filled {
            Ok(container) => self.offer(container, ready).await?,
            Err(error) => self.not_filled(error, ready).await?,
        };
        match outcome {
            Outcome::Good => {
                self.failures = 0;
                self.backoff.reset();
            }
            Outcome::Held => {}
            Outcome::Failed { reason } => self.failed(reason).await?,
        }
        ControlFlow::Continue(())
    }

    /// Makes the slot idle with this container, and serves its claim.
    async fn offer(
        &mut self,
        mut container: Container,
        ready: &mut Option<Ready>,
    ) -> ControlFlow<Ended, Outcome> {
        let image_id = container.image_id.clone();
        self.slot.hold(&container);
        adopt::keep(&self.slots, &self.slot, &mut container);
        if !self.guarded().await {
            return ControlFlow::Break(Ended::Stopped);
        }
        self.slot.apply(Event::Warmed);
        if let Some(ready) = ready.take() {
            self.announce();
            let _agent_gone = ready.send(Ok(()));
        }
        let served = self.serve(container).await;
        if self.slot.drain.is_cancelled() {
            return ControlFlow::Break(Ended::Stopped);
        }
        let (breakers, image) = (&self.slots.breakers, &self.slot.config.image);
        match &served {
            Ok(()) => breakers.worked(image),
            Err(reason) => breakers.failed(image, &image_id, reason, Instant::now()),
        }
        if self.slot.is_on_demand() {
            return ControlFlow::Break(match served {
                Ok(()) => Ended::Stopped,
                Err(reason) => Ended::Failed { reason },
            });
        }
        self.slot.apply(Event::Recycled);
        ControlFlow::Continue(match served {
            Ok(()) => Outcome::Good,
            Err(reason) => Outcome::Failed { reason },
        })
    }

    async fn not_filled(
        &mut self,
        error: fill::Error,
        ready: &mut Option<Ready>,
    ) -> ControlFlow<Ended, Outcome> {
        let is_clean = clear::clean(&self.slots, &self.slot, None).await;
        let reason = crate::chain(&error);
        let held = match &error {
            fill::Error::Open(open) => Some(open.retry_in.min(IMAGE_INTERVAL)),
            // An outage of Docker says nothing about the slot.
            error if error.is_silence() => Some(DOCKER_INTERVAL),
            _ => None,
        };
        // If nobody waits for the start, Nomad believes that the slot is running.
        if let Some(ready) = ready.take_if(|ready| !ready.is_closed()) {
            let _agent_gone = ready.send(Err(error));
            return ControlFlow::Break(self.give_up(reason));
        }
        if !is_clean {
            let reason = reason.clone();
            self.slot.apply(Event::Held { reason });
            if !self.cleaned().await {
                return ControlFlow::Break(Ended::Stopped);
            }
        }
        let Some(wait) = held else {
            return ControlFlow::Continue(Outcome::Failed { reason });
        };
        self.slot.apply(Event::Held { reason });
        match self.rest(Backoff::steady(wait).next_wait()).await {
            true => ControlFlow::Continue(Outcome::Held),
            false => ControlFlow::Break(Ended::Stopped),
        }
    }

    /// Pauses before the next container, or gives up the slot.
    async fn failed(&mut self, reason: String) -> ControlFlow<Ended> {
        self.failures += 1;
        let (slot, failures) = (self.slot.identity.slot_id(), self.failures);
        tracing::warn!(%slot, failures, reason, "a slot lost its container");
        if self.failures >= MAX_FAILURES {
            return ControlFlow::Break(self.give_up(reason));
        }
        let wait = self.backoff.next_wait();
        match self.rest(wait).await {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(Ended::Stopped),
        }
    }

    fn end(&self, end: Ended) {
        self.slots.idle.forget(&self.slot.identity.slot_id());
        self.slot.end.send_replace(Some((end, SystemTime::now())));
    }

    /// Waits until nothing is left of a failed container, because the next one must not
    /// exist next to it. Returns false if the slot is no longer wanted.
    async fn cleaned(&self) -> bool {
        while self.rest(DOCKER_INTERVAL).await {
            if clear::clean(&self.slots, &self.slot, None).await {
                return true;
            }
        }
        false
    }

    /// Returns false if the slot is no longer wanted.
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

    /// Waits until the run is over and its container gone.
    async fn wait_for(&self, run: &Run) {
        tokio::select! {
            () = run.gone() => {}
            () = self.slot.kill.cancelled() => {
                run.kill();
                run.gone().await;
            }
        }
        self.slot.apply(Event::RunEnded);
        self.slot.apply(Event::Recycled);
    }

    /// Waits with an idle container until it is claimed, dies or is no longer wanted. Then
    /// serves the claim, and ends the container. An error is the reason why the container
    /// died early.
    async fn serve(&mut self, mut container: Container) -> Result<(), String> {
        let idle_since = Instant::now();
        let (claim, died) = self.idle(&mut container).await;
        let mut ahead = None;
        let served = match (claim, &died) {
            (Some(claim), None) => {
                ahead = Ahead::begin(&self.slots, &self.slot);
                self.run(&mut container, &claim.run, claim.order).await;
                Some((claim.run, claim.share))
            }
            (Some(claim), Some(reason)) => {
                let reason = reason.clone();
                self.slots
                    .runs
                    .aborted(&claim.run, Refusal::Broken { reason });
                self.slot.apply(Event::RunEnded);
                Some((claim.run, claim.share))
            }
            (None, _) => None,
        };
        // While its control group still reports what it used.
        self.slot.let_go();
        // The next container never runs next to it.
        let Container { id, connection, .. } = &mut container;
        connection.end(&self.slots.site.docker, id).await;
        container.opened.close();
        // Its share is dropped here, because the room is free.
        let run = served.map(|(run, _share)| run);
        self.removed().await;
        let removal = clear::remove(self.slots.clone(), self.slot.clone(), container, run);
        self.removal = Some(self.slots.site.background.spawn(removal));
        if let Some(ahead) = ahead {
            self.next = ahead.take().await;
        }
        match died {
            Some(reason) if idle_since.elapsed() < MIN_IDLE_TIME => Err(reason),
            _ => Ok(()),
        }
    }

    /// Waits until Docker has removed the last container: per slot, only one container is
    /// removed at a time.
    async fn removed(&mut self) {
        if let Some(removal) = self.removal.take() {
            // A panic has already been reported.
            let _panicked = removal.await;
        }
    }

    async fn run(&self, container: &mut Container, run: &Run, order: Order) {
        // From now on, another life of the driver recovers it only as the container of its run.
        self.slots.idle.forget(&self.slot.identity.slot_id());
        let class = self.slots.site.config.class(self.slot.config.provider);
        let boosted = Boosted::take(&self.slots, self.slot.config.provider, &order.start);
        let boost_time = boosted
            .as_ref()
            .map_or(Duration::ZERO, |boosted| boosted.time);
        // Docker gets the raised limits while the command already runs. It sets them, too.
        let (docker, id) = (self.slots.site.docker.clone(), container.id.clone());
        let update = self.slots.site.background.spawn(async move {
            sleep(boost_time + LONG_RUN).await;
            if let Err(error) = docker.update(&id, &class).await {
                // The container of a short run is gone by now.
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "cannot update the limits in Docker"
                );
            }
        });
        let Container {
            connection,
            limits,
            opened,
            ..
        } = container;
        let runs = &self.slots.runs;
        let first = boosted.as_ref().map_or(class, |boosted| boosted.limits);
        let carried = carry::start(runs, run, connection, limits, opened, &first, order);
        boost::during(boosted, run, limits, &class, carried.instrument(run.span())).await;
        update.abort();
        if let Some(form) = run.form() {
            self.slot.steps.prompted(self.slot.config.provider, &form);
        }
        self.slot.apply(Event::RunEnded);
    }

    fn announce(&self) {
        let Slot {
            identity,
            config,
            idle,
            ..
        } = &*self.slot;
        let image = &config.image;
        let run = self.slots.site.config.class(config.provider);
        let message = match &config.run_id {
            None => format!("Warm: image {image}, idle {idle}; a run gets {run}"),
            Some(run_id) => format!("Ready: image {image}, for run {run_id} alone; it gets {run}"),
        };
        self.slots.site.events.send(identity, message);
    }
}
