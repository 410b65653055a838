//! What callers ask of the pools.

use std::time::Duration;

use futures_util::{Stream, stream};
use polydev_proto::{
    node,
    runtime::{
        DrainPoolResponse, Drained, Draining, GetPoolResponse, ListPoolsResponse, Pool,
        ResumePoolResponse, ScalePoolResponse, ScaleWaiting, Scaled, Slot, SlotState,
        WatchPoolsResponse, drain_pool_response as draining, resume_pool_response as resuming,
        scale_pool_response as scaling,
    },
};
use tokio::{sync::mpsc, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Status;

use crate::{
    nomad::Nomad,
    pool::{Counts, View, scale},
    provider::Provider,
    run::{Error, request::Invalid},
};

/// Between two looks at pools that change all the time.
const PACE: Duration = Duration::from_millis(250);

/// A provider by its name.
///
/// # Errors
/// [`Error::Invalid`]
pub(super) fn provider(name: &str) -> Result<Provider, Error> {
    Ok(name.parse().map_err(Invalid::from)?)
}

pub(super) fn list(view: &View) -> ListPoolsResponse {
    let counts = view.counts();
    let mut pools: Vec<Pool> = Provider::all()
        .map(|provider| encode(provider, counts.get(provider.name())))
        .collect();
    pools.sort_by(|a, b| a.provider.cmp(&b.provider));
    let (connected, unreachable) = view.nodes();
    ListPoolsResponse {
        pools,
        nodes_connected: u32::try_from(connected).unwrap_or(u32::MAX),
        nodes_unreachable: u32::try_from(unreachable).unwrap_or(u32::MAX),
    }
}

pub(super) fn get(view: &View, provider: Provider) -> GetPoolResponse {
    let slots = view.slots(provider.name()).into_iter();
    let slots = slots.map(|(node_id, slot)| Slot {
        node_id,
        state: state(slot.state()).into(),
        slot_id: slot.slot_id,
        job_id: slot.job_id,
        since: slot.since,
        reason: slot.reason,
        generation: slot.generation,
        image: slot.image,
        run_id: slot.run_id,
        on_demand: !slot.for_run_id.is_empty(),
        cause: slot.cause,
    });
    GetPoolResponse {
        pool: Some(encode(provider, view.counts().get(provider.name()))),
        slots: slots.collect(),
    }
}

pub(super) fn watch(view: View) -> impl Stream<Item = WatchPoolsResponse> + Send {
    let state = (view.changes(), view, None);
    stream::unfold(state, |(mut changes, view, told)| async move {
        loop {
            changes.mark_unchanged();
            let ListPoolsResponse {
                pools,
                nodes_connected,
                nodes_unreachable,
            } = list(&view);
            let now = WatchPoolsResponse {
                pools,
                nodes_connected,
                nodes_unreachable,
            };
            if told.as_ref() != Some(&now) {
                return Some((now.clone(), (changes, view, Some(now))));
            }
            sleep(PACE).await;
            // Its sender is in the view.
            changes.changed().await.ok()?;
        }
    })
}

pub(super) fn scale(
    tasks: Tasks,
    nomad: Nomad,
    provider: Provider,
    size: u32,
) -> ReceiverStream<Result<ScalePoolResponse, Status>> {
    tell(tasks, move |events| async move {
        let event = |event| ScalePoolResponse { event: Some(event) };
        let waiting = waiting(&events, |reason| event(scaling::Event::Waiting(reason)));
        let from = scale::scale(&nomad, provider, size, waiting).await?;
        let scaled = Scaled { from, to: size };
        let _gone = events.send(Ok(event(scaling::Event::Scaled(scaled)))).await;
        Ok(())
    })
}

pub(super) fn resume(
    tasks: Tasks,
    nomad: Nomad,
    provider: Provider,
) -> ReceiverStream<Result<ResumePoolResponse, Status>> {
    tell(tasks, move |events| async move {
        let event = |event| ResumePoolResponse { event: Some(event) };
        let waiting = waiting(&events, |reason| event(resuming::Event::Waiting(reason)));
        let to = scale::resume(&nomad, provider, waiting).await?;
        let scaled = Scaled { from: 0, to };
        let _gone = events
            .send(Ok(event(resuming::Event::Scaled(scaled))))
            .await;
        Ok(())
    })
}

pub(super) fn drain(
    tasks: Tasks,
    nomad: Nomad,
    view: View,
    provider: Provider,
) -> ReceiverStream<Result<DrainPoolResponse, Status>> {
    tell(tasks, move |events| async move {
        let event = |event| DrainPoolResponse { event: Some(event) };
        let waiting = waiting(&events, |reason| event(draining::Event::Waiting(reason)));
        if let Some(from) = scale::drain(&nomad, provider, waiting).await? {
            let scaled = Scaled { from, to: 0 };
            let _gone = events
                .send(Ok(event(draining::Event::Scaled(scaled))))
                .await;
        }
        let (mut changes, mut told) = (view.changes(), None);
        loop {
            changes.mark_unchanged();
            let counts = view.counts();
            let counts = counts.get(provider.name()).copied().unwrap_or_default();
            let runs = view.slots(provider.name());
            let in_pool = |slot: &node::Slot| !slot.run_id.is_empty() && slot.for_run_id.is_empty();
            let runs = runs.iter().filter(|(_, slot)| in_pool(slot)).count();
            let left = Draining {
                slots: counts.slots(),
                runs: u32::try_from(runs).unwrap_or(u32::MAX),
            };
            // A node that cannot be asked, or that has left, may have some.
            let (nodes, unreachable) = view.channels();
            if left.slots == 0 && !nodes.is_empty() && unreachable.is_empty() {
                let _gone = events
                    .send(Ok(event(draining::Event::Drained(Drained {}))))
                    .await;
                return Ok(());
            }
            if told != Some(left) {
                told = Some(left);
                let _gone = events
                    .send(Ok(event(draining::Event::Draining(left))))
                    .await;
            }
            sleep(PACE).await;
            if changes.changed().await.is_err() {
                return Ok(());
            }
        }
    })
}

/// Where calls go on, and until when.
#[derive(Clone, Copy)]
pub(super) struct Tasks<'a> {
    pub(super) tracker: &'a TaskTracker,
    /// The shim stops.
    pub(super) stop: &'a CancellationToken,
}

/// A call whose events come from a task, which ends when its caller is gone, or the shim stops.
fn tell<T, F>(
    tasks: Tasks,
    work: impl FnOnce(mpsc::Sender<Result<T, Status>>) -> F,
) -> ReceiverStream<Result<T, Status>>
where
    T: Send + 'static,
    F: Future<Output = Result<(), scale::Error>> + Send + 'static,
{
    let (events, responses) = mpsc::channel(4);
    let work = work(events.clone());
    let stop = tasks.stop.clone();
    tasks.tracker.spawn(async move {
        let worked = tokio::select! {
            worked = work => worked.map_err(Status::from),
            () = events.closed() => return,
            // What Nomad has been told holds.
            () = stop.cancelled() => Err(Error::Stopping.into()),
        };
        if let Err(status) = worked {
            let _gone = events.send(Err(status)).await;
        }
    });
    ReceiverStream::new(responses)
}

/// Says why Nomad is waited for: the first of a call's events, for which there is room.
fn waiting<T>(
    events: &mpsc::Sender<Result<T, Status>>,
    event: impl Fn(ScaleWaiting) -> T,
) -> impl Fn(String) {
    move |reason| {
        let _gone = events.try_send(Ok(event(ScaleWaiting { reason })));
    }
}

fn encode(provider: Provider, counts: Option<&Counts>) -> Pool {
    let counts = counts.copied().unwrap_or_default();
    Pool {
        provider: provider.name().into(),
        slots: counts.slots(),
        warming: counts.warming,
        idle: counts.idle,
        leased: counts.leased,
        claimed: counts.claimed,
        recycling: counts.recycling,
        draining: counts.draining,
        failed: counts.failed,
        on_demand: counts.on_demand,
    }
}

fn state(state: node::slot::State) -> SlotState {
    match state {
        node::slot::State::Unspecified => SlotState::Unspecified,
        node::slot::State::Warming => SlotState::Warming,
        node::slot::State::Idle => SlotState::Idle,
        node::slot::State::Leased => SlotState::Leased,
        node::slot::State::Claimed => SlotState::Claimed,
        node::slot::State::Recycling => SlotState::Recycling,
        node::slot::State::Draining => SlotState::Draining,
        node::slot::State::Failed => SlotState::Failed,
    }
}
