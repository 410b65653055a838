//! More CPU for the start of a run, if the node has it: a CLI that starts cold needs it.

use std::{pin::pin, time::Duration};

use polydev_proto::{init::Start, provider::Provider};
use tokio::time::sleep;

use super::Slots;
use crate::{
    headroom::{Amount, Share},
    limits::{self, Limits},
    run::Run,
};

/// The limits of a run at its start.
pub(super) struct Boosted {
    pub(super) limits: Limits,
    pub(super) time: Duration,
    share: Share,
}

impl Boosted {
    /// Takes what the node's configuration gives, as far as the headroom has it. `None` for a run
    /// that has the limits of its class from the start, as one whose CLI has started already.
    pub(super) fn take(slots: &Slots, provider: Provider, start: &Start) -> Option<Self> {
        // A script computes from its start to its end, with what its class has.
        provider.vendor().ok()?;
        let class = slots.site.config.class(provider);
        if start
            .prompt
            .as_ref()
            .is_some_and(|prompt| prompt.cold_reason.is_empty())
        {
            return None;
        }
        let boost = slots.site.config.start_boost?;
        let more = Amount {
            cpu_mhz: boost.cpu_mhz.saturating_sub(class.cpu_mhz),
            memory_mb: 0,
        };
        let share = slots.headroom.take(more).ok()?;
        Some(Self {
            limits: Limits {
                cpu_mhz: boost.cpu_mhz,
                ..class
            },
            time: boost.time,
            share,
        })
    }
}

/// Waits for the end of a run, and meanwhile ends its boost when its time is over. The time begins
/// once the limits are raised, so that they are not raised again after its end.
pub(super) async fn during(
    boosted: Option<Boosted>,
    run: &Run,
    limits: &limits::Handle,
    class: &Limits,
    carried: impl Future<Output = ()>,
) {
    let Some(Boosted { time, share, .. }) = boosted else {
        return carried.await;
    };
    let mut carried = pin!(carried);
    let over = async {
        run.known().await;
        sleep(time).await;
    };
    tokio::select! {
        () = &mut carried => return,
        () = over => {}
    }
    match limits.set_cpu(class) {
        Ok(()) => drop(share),
        // It goes on with what it has, and keeps its share.
        Err(error) => {
            let error = crate::chain(&error);
            tracing::warn!(error, "cannot end the boost of a run");
            carried.await;
            return drop(share);
        }
    }
    carried.await;
}
