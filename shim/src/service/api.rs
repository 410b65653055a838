//! The calls of `polydev.runtime.v1`, one method each, whether they come over gRPC or HTTP. A
//! method takes the caller and the request, checks in [`allow`] whether the caller may, asks
//! `run`, `pool` or `credentials`, and answers the response. In reading order: [`run`] starts
//! runs and goes back to them, by way of [`carry`]; [`runs`] reports on them; [`leases`] keeps
//! slots for them. [`pools`] reports on pools, and [`sizing`] changes their size. [`cluster`] is
//! about nodes, and [`credentials`] about credentials. What is answered a page at a time is in
//! [`page`].

mod allow;

mod carry;
mod leases;
mod run;
mod runs;

mod pools;
mod sizing;

mod cluster;
mod credentials;
mod page;

use std::sync::Arc;

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    access::Access,
    credentials::Vault,
    nomad::Nomad,
    pool::View,
    rate::Rate,
    run::{on_demand::OnDemand, queue::Queue},
};

/// What a shim lets its callers do.
pub(super) struct Api {
    pub(super) view: View,
    /// `None` with the embedded engine, whose pools have the sizes they were started with.
    pub(super) nomad: Option<Nomad>,
    pub(super) vault: Arc<Vault>,
    pub(super) access: Access,
    pub(super) queue: Queue,
    pub(super) on_demand: OnDemand,
    pub(super) user_rate: Rate,
    /// The work that a shim waits for, for a time, when it stops.
    pub(super) runs: TaskTracker,
    /// The shim stops: it starts nothing new.
    pub(super) stop: CancellationToken,
    /// The runs that still go on are left to another shim.
    pub(super) hand_over: CancellationToken,
}
