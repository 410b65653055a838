//! Keeps a broker and a connection to it: [`process`] starts it, or finds the one that an
//! earlier life of the driver started, and [`wire`] is the connection.

use std::{path::PathBuf, sync::Arc, time::Duration};

use futures_util::FutureExt;
use polydev_proto::broker::{Seen, from_broker};
use polydev_transport::backoff::Backoff;
use tokio::{sync::watch, time::sleep};

use super::{
    Broker, process,
    wire::{self, Wire},
};

/// Between tries to start a broker.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));

/// Keeps a broker and a connection to it; never returns. `program` is started in `state_dir` as
/// the user `uid`. `report` gets what it has seen of runs, in its order; `changed` counts what
/// shims are to see again, such as its public key.
pub async fn keep(
    broker: Arc<Broker>,
    program: PathBuf,
    state_dir: PathBuf,
    uid: u32,
    changed: watch::Sender<u64>,
    report: impl Fn(Seen),
) {
    let mut backoff = BACKOFF;
    loop {
        let connected = process::connect(&program, &state_dir, uid, broker.seed());
        let error = match connected.await {
            Ok(stream) => {
                let served = serve(&broker, Wire::new(stream), &report, &mut backoff, &changed);
                let error = served.await;
                broker.lost();
                changed.send_modify(|version| *version += 1);
                crate::chain(&error)
            }
            Err(error) => crate::chain(&error),
        };
        tracing::warn!(error, "there is no broker");
        sleep(backoff.next_wait()).await;
    }
}

/// Serves one connection until it breaks; returns the reason.
async fn serve(
    broker: &Broker,
    mut wire: Wire,
    report: &impl Fn(Seen),
    backoff: &mut Backoff,
    changed: &watch::Sender<u64>,
) -> wire::Error {
    let greeted = match wire.greeted().await {
        Ok(greeted) => greeted,
        Err(error) => return error,
    };
    backoff.reset();
    let held = greeted.held.iter().filter_map(|open| open.grant.as_ref());
    let before: Vec<Seen> = held.filter_map(|grant| grant.seen.clone()).collect();
    let mut orders = broker.connected(greeted);
    // The last connection's silence does not count.
    let _silent_before = broker.silent.notified().now_or_never();
    changed.send_modify(|version| *version += 1);
    before.into_iter().for_each(report);
    loop {
        for (message, socket) in orders.into_iter().filter_map(|order| broker.message(order)) {
            if let Err(error) = wire.send(message, socket.as_deref()).await {
                return error;
            }
        }
        orders = loop {
            tokio::select! {
                () = broker.changed.notified() => break broker.unsent(),
                () = broker.silent.notified() => return wire::Error::Hung,
                message = wire.next() => match message {
                    Ok(message) => receive(broker, message, report),
                    Err(error) => return error,
                },
            }
        };
    }
}

fn receive(broker: &Broker, message: from_broker::Message, report: &impl Fn(Seen)) {
    match message {
        from_broker::Message::Granted(granted) => broker.answered(&granted.container, Ok(())),
        from_broker::Message::Refused(refused) => {
            broker.answered(&refused.container, Err(refused.message));
        }
        from_broker::Message::Seen(seen) => {
            broker.saw(&seen);
            report(seen);
        }
        from_broker::Message::Closed(closed) => broker.closed(closed),
        // Only sent first.
        from_broker::Message::Hello(_) | from_broker::Message::Held(_) => {}
    }
}
