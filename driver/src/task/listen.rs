//! What init says about the command of a plain task, and signals to the command.

use std::time::Duration;

use polydev_proto::init::{Exited, Signal, from_init, hello, to_init};
use tokio::time::sleep;

use crate::{
    broker::Opened,
    link::{Greeted, Link, Listener},
    process::Held,
};

/// Time after a connection that failed.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// Init's report on its command.
pub(super) enum Word {
    Exited(Exited),
    NotStarted,
    /// The connection was made or lost.
    Nothing,
}

/// Waits until init sends a message or reconnects.
///
/// # Cancel safety
/// Loses nothing that init would not resend.
pub(super) async fn listen(
    listener: &Option<Listener>,
    link: &mut Option<Link>,
    outside: Option<&Opened>,
    pid: u32,
) -> Word {
    if let Some(connected) = link {
        return match connected.reader.next().await {
            Ok(from_init::Message::Exited(exited)) => Word::Exited(exited),
            Ok(other) => {
                tracing::debug!(?other, "init sent an unexpected message");
                Word::Nothing
            }
            // Init will reconnect, or its end will be seen.
            Err(_) => {
                *link = None;
                Word::Nothing
            }
        };
    }
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    match listener.accept(|peer| peer == pid).await {
        Ok(Greeted {
            state,
            link: new,
            requests,
            ..
        }) => {
            *link = Some(new);
            if let (Some(outside), Some(requests)) = (outside, requests) {
                outside.listens(requests);
            }
            match state {
                hello::State::Exited(exited) => Word::Exited(exited),
                hello::State::Running(_) => Word::Nothing,
                hello::State::Waiting(_)
                | hello::State::Receiving(_)
                | hello::State::NotStarted(_) => Word::NotStarted,
            }
        }
        Err(error) => {
            tracing::debug!(error = crate::chain(&error), "a connection of init failed");
            sleep(RETRY_INTERVAL).await;
            Word::Nothing
        }
    }
}

/// Sends a signal to the command through init, which alone knows the command. If init is
/// not connected, as after a restart of the driver, it forwards signals that it receives
/// itself. Without init, process 1 is the command.
pub(super) async fn signal(process: &Held, link: &mut Option<Link>, number: i32) {
    let Some(connected) = link else {
        return process.signal(number);
    };
    let signal = to_init::Message::Signal(Signal { number });
    if connected.writer.send(signal).await.is_err() {
        *link = None;
        process.signal(number);
    }
}
