//! The calls of `polydev.runtime.v1`, one method each, whether they come over gRPC or HTTP. A
//! method takes the caller and the request, checks in [`allow`] whether the caller may make the
//! call, asks `run`, `pool` or `credentials`, and returns the response. In reading order:
//!
//! - [`run`] starts runs and attaches to them, with the help of [`carry`];
//! - [`scripts`] runs scripts, [`runs`] reports on runs, and [`leases`] keeps slots for runs;
//! - [`approvals`] is what waits for somebody's approval;
//! - [`pools`] reports on pools, and [`sizing`] changes their sizes;
//! - [`cluster`] is about nodes, [`images`] about what is on their disks, and [`credentials`] about
//!   credentials;
//! - [`page`] has what calls with pages share.

mod allow;

mod approvals;
mod carry;
mod leases;
mod run;
mod runs;
mod scripts;

mod pools;
mod sizing;

mod cluster;
mod credentials;
mod images;
mod page;

use std::sync::Arc;

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::bodies::Bodies;
use crate::{
    access::Access, audit::Audit, credentials::Vault, metrics::Metrics, nomad::Nomad,
    permission::Signer, policy::RunPolicy, pool::View, rate::Rate, run::claim::Turns,
    traces::Traces,
};

/// The calls of a shim, and what they need.
pub(super) struct Api {
    pub(super) view: View,
    /// `None` with the embedded engine, whose pools keep their first sizes.
    pub(super) nomad: Option<Nomad>,
    pub(super) vault: Arc<Vault>,
    pub(super) access: Arc<Access>,
    pub(super) policy: Arc<RunPolicy>,
    pub(super) signer: Signer,
    pub(super) audit: Audit,
    pub(super) traces: Traces,
    pub(super) metrics: Metrics,
    pub(super) turns: Turns,
    pub(super) user_rate: Rate,
    pub(super) bodies: Bodies,
    /// The work that a stopping shim waits for, up to a deadline.
    pub(super) runs: TaskTracker,
    /// Cancelled when the shim stops: the shim then starts nothing new.
    pub(super) stop: CancellationToken,
    /// Cancelled when the shim leaves the remaining runs to another shim.
    pub(super) hand_over: CancellationToken,
}
