//! Recovers runs that were open when an earlier life of the driver ended. They continued in
//! their containers, and continue here.

use std::sync::Arc;

use polydev_proto::{node::ended::Reason, provider::Provider};
use tokio::sync::mpsc;
use tracing::Instrument;

use crate::{
    broker::Opened,
    docker::removal,
    limits::{self, Limits},
    link::{Connection, Listener},
    process::Held,
    run::{Input, Run, book::Open, carry},
    slot::Slots,
};

/// Recovers all open runs, before anybody can ask for them. dockerd is not needed.
pub(super) fn recover(slots: &Arc<Slots>, open: Vec<Open>) {
    for Open { run, inputs } in open {
        let share = slots.headroom.take_back(run.claimed.share);
        slots.idle.forget(&run.claimed.slot_id);
        // Its connections go on, with the keys that the broker has.
        let opened = slots.site.broker.keep(
            &run.claimed.container,
            class(slots, &run).bytes_per_second(),
        );
        let slots = slots.clone();
        let (site, span) = (slots.site.clone(), run.span());
        let resumed = async move {
            resume(&slots, &run, &opened, inputs).await;
            drop(opened);
            drop(share);
            removal::remove(&slots.site.docker, &run.claimed.container).await;
            run.is_gone();
        };
        site.background.spawn(resumed.instrument(span));
    }
}

/// The limits of a run. An older driver wrote no provider, and knew one class.
fn class(slots: &Slots, run: &Run) -> Limits {
    let config = &slots.site.config;
    let provider = Provider::named(&run.claimed.provider);
    provider.map_or(config.run, |provider| config.class(provider))
}

async fn resume(slots: &Slots, run: &Run, opened: &Opened, inputs: mpsc::Receiver<Input>) {
    let claimed = &run.claimed;
    let runs = &slots.runs;
    let lost = async |message: &str| {
        if let Some(seen) = opened.finish().await {
            runs.answered(run, seen);
        }
        runs.ended(run, run.with_answers(run.end(Reason::Lost, message)));
    };
    if claimed.boot_id != runs.boot_id {
        return lost("the machine was restarted").await;
    }
    let Some(init) = Held::find(claimed.pid, claimed.pid_start) else {
        return lost("its container ended while the driver was away").await;
    };
    let listener = match Listener::bind_again(&claimed.link) {
        Ok(listener) => listener,
        Err(error) => {
            init.kill();
            return lost(&crate::chain(&error)).await;
        }
    };
    // The limits show why the kernel ended a run; the run continues without them.
    let (pid, class) = (claimed.pid, class(slots, run));
    let limits = tokio::task::spawn_blocking(move || limits::Handle::open_again(pid, &class)).await;
    let limits = limits.ok().and_then(|opened| {
        opened
            .inspect_err(|error| {
                let run_id = claimed.run_id;
                tracing::warn!(
                    %run_id,
                    error = crate::chain(error),
                    "cannot read a run's limits"
                );
            })
            .ok()
    });
    // The driver may have died before it ended the run's boost.
    if slots.site.config.start_boost.is_some()
        && let Some(limits) = &limits
        && let Err(error) = limits.set_cpu(&class)
    {
        let (run_id, error) = (claimed.run_id, crate::chain(&error));
        tracing::warn!(%run_id, error, "cannot end the boost of a run");
    }
    tracing::info!(
        run_id = %claimed.run_id,
        slot = %claimed.slot_id,
        "a run continues"
    );
    let mut connection = Connection {
        listener,
        init,
        pid,
        link: None,
    };
    carry::resume(runs, run, &mut connection, limits.as_ref(), opened, inputs).await;
    connection.end(&slots.site.docker, &claimed.container).await;
    connection.listener.let_go();
}
