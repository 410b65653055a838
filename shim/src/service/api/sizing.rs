//! The calls that change the size of a pool: `ScalePool`, `DrainPool` and `ResumePool`. The work
//! of each runs in a task beside the call, and reports its progress.

use polydev_proto::{
    node,
    provider::Provider,
    runtime::{
        DrainPoolRequest, DrainPoolResponse, Drained, Draining, ResumePoolRequest,
        ResumePoolResponse, ScalePoolRequest, ScalePoolResponse, ScaleWaiting, Scaled,
        drain_pool_response as draining, resume_pool_response as resuming,
        scale_pool_response as scaling,
    },
};
use tokio::{sync::mpsc, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{
    Api,
    pools::{self, LOOK_INTERVAL},
};
use crate::{
    access::{Action, Caller},
    audit::record::{Operation, Record},
    nomad::Nomad,
    pool::{View, scale},
    run::Error,
};

/// How many events may wait for their caller.
const MAX_EVENTS: usize = 4;

/// The events that a call returns, as they come.
type Events<T> = ReceiverStream<Result<T, Status>>;

impl Api {
    pub(in crate::service) fn scale_pool(
        &self,
        caller: &Caller,
        ScalePoolRequest { provider, size }: ScalePoolRequest,
    ) -> Result<Events<ScalePoolResponse>, Status> {
        self.size(
            caller,
            Operation::Scale,
            &provider,
            move |nomad, provider, told: Told<ScalePoolResponse>| async move {
                let waiting = |reason| told.waiting(reason);
                let from = scale::scale(&nomad, provider, size, waiting).await?;
                told.scaled(from, size).await;
                Ok(())
            },
        )
    }

    pub(in crate::service) fn drain_pool(
        &self,
        caller: &Caller,
        DrainPoolRequest { provider }: DrainPoolRequest,
    ) -> Result<Events<DrainPoolResponse>, Status> {
        let view = self.view.clone();
        self.size(
            caller,
            Operation::Drain,
            &provider,
            move |nomad, provider, told: Told<DrainPoolResponse>| async move {
                let waiting = |reason| told.waiting(reason);
                if let Some(from) = scale::drain(&nomad, provider, waiting).await? {
                    told.scaled(from, 0).await;
                }
                emptied(&view, provider, &told).await;
                Ok(())
            },
        )
    }

    pub(in crate::service) fn resume_pool(
        &self,
        caller: &Caller,
        ResumePoolRequest { provider }: ResumePoolRequest,
    ) -> Result<Events<ResumePoolResponse>, Status> {
        self.size(
            caller,
            Operation::Resume,
            &provider,
            move |nomad, provider, told: Told<ResumePoolResponse>| async move {
                let waiting = |reason| told.waiting(reason);
                let to = scale::resume(&nomad, provider, waiting).await?;
                told.scaled(0, to).await;
                Ok(())
            },
        )
    }

    /// Starts the work of a call, if the caller may change the pool's size. The work ends when the
    /// caller disconnects or the shim stops. A size that Nomad has received stays.
    fn size<T, F>(
        &self,
        caller: &Caller,
        operation: Operation,
        provider: &str,
        work: impl FnOnce(Nomad, Provider, Told<T>) -> F,
    ) -> Result<Events<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<(), scale::Error>> + Send + 'static,
    {
        let provider = pools::provider(provider)?;
        let record = Record::new(caller, operation).provider(provider.name());
        self.permit(caller, Action::Scale { provider }, &record)?;
        let nomad = self.nomad.clone().ok_or_else(|| {
            let reason =
                "this shim runs without Nomad: only its option `--pool` sets the sizes of pools";
            Status::unimplemented(reason)
        })?;
        let (events, responses) = mpsc::channel(MAX_EVENTS);
        let work = work(nomad, provider, Told(events.clone()));
        let stop = self.stop.clone();
        self.runs.spawn(async move {
            let worked = tokio::select! {
                worked = work => worked.map_err(Status::from),
                () = events.closed() => return,
                () = stop.cancelled() => Err(Error::Stopping.into()),
            };
            if let Err(status) = worked {
                let _gone = events.send(Err(status)).await;
            }
        });
        Ok(ReceiverStream::new(responses))
    }
}

/// Reports what is left of a pool that is being drained, until nothing is left.
async fn emptied(view: &View, provider: Provider, told: &Told<DrainPoolResponse>) {
    let event = |event| DrainPoolResponse { event: Some(event) };
    let (mut changes, mut last) = (view.changes(), None);
    loop {
        changes.mark_unchanged();
        let left = left(view, provider);
        // A node that is unreachable or no longer known may still have slots.
        let (nodes, unreachable) = view.channels();
        if left.slots == 0 && !nodes.is_empty() && unreachable.is_empty() {
            told.send(event(draining::Event::Drained(Drained {}))).await;
            return;
        }
        if last != Some(left) {
            last = Some(left);
            told.send(event(draining::Event::Draining(left))).await;
        }
        sleep(LOOK_INTERVAL).await;
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// The number of slots of a pool, and of the runs in them.
fn left(view: &View, provider: Provider) -> Draining {
    let counts = view.counts();
    let counts = counts.get(provider.name()).copied().unwrap_or_default();
    let slots = view.slots(provider.name());
    let has_run = |slot: &node::Slot| !slot.run_id.is_empty() && slot.for_run_id.is_empty();
    let runs = slots.iter().filter(|(_, slot)| has_run(slot)).count();
    Draining {
        slots: counts.slots(),
        runs: u32::try_from(runs).unwrap_or(u32::MAX),
    }
}

/// The caller of a call that changes the size of a pool.
struct Told<T>(mpsc::Sender<Result<T, Status>>);

impl<T: Sizing> Told<T> {
    /// Reports that the call waits for Nomad. This is the call's first event, so there is room.
    fn waiting(&self, reason: String) {
        let waiting = T::waiting(ScaleWaiting { reason });
        let _gone = self.0.try_send(Ok(waiting));
    }

    /// Reports that Nomad has the new size.
    async fn scaled(&self, from: u32, to: u32) {
        self.send(T::scaled(Scaled { from, to })).await;
    }

    async fn send(&self, event: T) {
        let _gone = self.0.send(Ok(event)).await;
    }
}

/// The responses of these calls have these events in common.
trait Sizing {
    fn waiting(waiting: ScaleWaiting) -> Self;
    fn scaled(scaled: Scaled) -> Self;
}

macro_rules! sizing {
    ($($response:ident $events:ident;)*) => {
        $(impl Sizing for $response {
            fn waiting(waiting: ScaleWaiting) -> Self {
                let event = Some($events::Event::Waiting(waiting));
                Self { event }
            }

            fn scaled(scaled: Scaled) -> Self {
                let event = Some($events::Event::Scaled(scaled));
                Self { event }
            }
        })*
    };
}

sizing! {
    ScalePoolResponse scaling;
    DrainPoolResponse draining;
    ResumePoolResponse resuming;
}
