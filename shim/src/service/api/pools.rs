//! The calls that report on pools: `ListPools`, `GetPool` and `WatchPools`.

use std::time::Duration;

use futures_util::{Stream, stream};
use polydev_proto::{
    init::agent,
    node,
    provider::Provider,
    runtime::{
        GetPoolRequest, GetPoolResponse, ListPoolsResponse, Pool, Slot, SlotState,
        WatchPoolsResponse,
    },
};
use tokio::time::sleep;

use super::Api;
use crate::{
    access::{Action, Caller, What},
    audit::record::{Operation, Record},
    pool::{Counts, View},
    run::{Error, request::Invalid},
};

/// The shortest interval between two reports on pools that change all the time.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(250);

impl Api {
    pub(in crate::service) fn list_pools(
        &self,
        caller: &Caller,
    ) -> Result<ListPoolsResponse, Error> {
        let record = Record::new(caller, Operation::Look);
        self.check(caller, Action::Look, &record)?;
        Ok(list(&self.view))
    }

    pub(in crate::service) fn get_pool(
        &self,
        caller: &Caller,
        request: GetPoolRequest,
    ) -> Result<GetPoolResponse, Error> {
        // It shows whose runs are in the pool.
        let record = Record::new(caller, Operation::Look).provider(&request.provider);
        self.permit(caller, Action::Look, &record)?;
        let provider = provider(&request.provider)?;
        let mut pool = get(&self.view, provider);
        // Whoever knows a run's id can ask for the run, and use the id for another one.
        for slot in &mut pool.slots {
            let run = Action::Run {
                what: What::Existing,
                // An older driver does not say whose the run is: then it takes the right to all.
                user_id: Some(&*slot.user_id).filter(|user_id| !user_id.is_empty()),
                provider: Some(provider),
            };
            if self.access.check(caller, run).is_err() {
                slot.run_id.clear();
                slot.user_id.clear();
            }
        }
        Ok(pool)
    }

    pub(in crate::service) fn watch_pools(
        &self,
        caller: &Caller,
    ) -> Result<impl Stream<Item = WatchPoolsResponse> + Send + use<>, Error> {
        let record = Record::new(caller, Operation::Look);
        self.check(caller, Action::Look, &record)?;
        Ok(watch(self.view.clone()))
    }
}

/// A provider by its name.
///
/// # Errors
/// [`Error::Invalid`]
pub(super) fn provider(name: &str) -> Result<Provider, Error> {
    Ok(name.parse().map_err(Invalid::from)?)
}

fn list(view: &View) -> ListPoolsResponse {
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

fn get(view: &View, provider: Provider) -> GetPoolResponse {
    let slots = view.slots(provider.name()).into_iter();
    let slots = slots.map(|(node_id, slot)| {
        let state = state(slot.state()).into();
        let agent = slot.agent.unwrap_or_default();
        Slot {
            node_id,
            state,
            slot_id: slot.slot_id,
            job_id: slot.job_id,
            since: slot.since,
            reason: slot.reason,
            generation: slot.generation,
            image: slot.image,
            run_id: slot.run_id,
            user_id: slot.user_id,
            on_demand: !slot.for_run_id.is_empty(),
            cause: slot.cause,
            agent: agent.state() == agent::State::Ready,
            agent_reason: agent.reason,
        }
    });
    GetPoolResponse {
        pool: Some(encode(provider, view.counts().get(provider.name()))),
        slots: slots.collect(),
    }
}

fn watch(view: View) -> impl Stream<Item = WatchPoolsResponse> + Send {
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
            sleep(LOOK_INTERVAL).await;
            // This cannot fail: the sender is in the view.
            changes.changed().await.ok()?;
        }
    })
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
