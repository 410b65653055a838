//! What the driver learns about the runs.

use http::StatusCode;
use polydev_proto::{
    broker::{Answered, from_broker::Message},
    provider::Provider,
};
use tokio::sync::mpsc;

use crate::{container::Container, grant::Grant};

/// Most events that wait for the driver. While it is away, more are dropped.
const MAX_WAITING: usize = 1024;

/// Where the broker tells what it sees.
#[derive(Debug, Clone)]
pub(crate) struct Events(mpsc::Sender<Message>);

impl Events {
    pub(crate) fn new() -> (Self, mpsc::Receiver<Message>) {
        let (sender, receiver) = mpsc::channel(MAX_WAITING);
        (Self(sender), receiver)
    }

    /// An API answered with an error.
    pub(crate) fn answered(
        &self,
        container: &Container,
        grant: &Grant,
        provider: Provider,
        status: StatusCode,
        credential_refused: bool,
    ) {
        self.send(Message::Answered(Answered {
            container: container.name().to_owned(),
            run_id: grant.run_id().to_owned(),
            provider: provider.to_string(),
            status: status.as_u16().into(),
            credential_refused,
        }));
    }

    fn send(&self, message: Message) {
        if self.0.try_send(message).is_err() {
            tracing::warn!("an event was dropped: the driver does not read them");
        }
    }
}
