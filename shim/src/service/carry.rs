//! A run of a call: admitted, connected, and carried beside the call.

use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt};
use polydev_proto::{
    node::TraceContext,
    runtime::{RunEvent, RunStart},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::Service;
use crate::{
    access::{Action, Caller},
    credentials::record::Binding,
    run::{
        Connection, Error,
        attach::Name,
        input::Own,
        queue::Running,
        relay::{self, Relay},
        request,
    },
};

impl Service {
    /// A run that may be tried, with its credential.
    pub(super) async fn admit(
        &self,
        start: RunStart,
        trace: Option<TraceContext>,
        caller: &Caller,
    ) -> Result<request::Request, Error> {
        let mut request = request::Request::parse(start, trace)?;
        let (user_id, provider) = (request.user_id.as_str(), request.provider);
        let run = Action::Run {
            user_id: Some(user_id),
            provider: Some(provider),
        };
        self.check(caller, run)?;
        self.user_rate.check(user_id)?;
        if let Some(source) = request.credential.take() {
            let binding = Binding { user_id, provider };
            let run_id = request.run_id.to_string();
            let secrets = self.vault.prepare(source, binding, &run_id).await?;
            request.equip(secrets)?;
        }
        let run_id = request.run_id;
        tracing::info!(%run_id, %caller, %provider, user_id = request.user_id, "run");
        Ok(request)
    }

    pub(super) fn relay(
        &self,
        name: Name,
        received: Instant,
        offsets: [u64; 3],
        own_input: Option<Own>,
        longest: Duration,
    ) -> (
        Relay,
        impl Stream<Item = Result<RunEvent, Status>> + Send + use<>,
    ) {
        let (caller, events) = mpsc::channel(relay::EVENTS);
        let relay = Relay {
            view: self.view.clone(),
            name,
            received,
            offsets,
            own_input,
            longest,
            caller,
        };
        let events = ReceiverStream::new(events);
        (relay, events.map(|event| event.map_err(Status::from)))
    }

    /// Gets a run its connection, and carries it.
    pub(super) fn carry<F>(
        &self,
        relay: Relay,
        requests: relay::Inputs,
        connect: impl FnOnce(mpsc::Sender<Result<RunEvent, Error>>) -> F,
    ) where
        F: Future<Output = Result<(Connection, Option<Running>), Error>> + Send + 'static,
    {
        let (caller, run_id) = (relay.caller.clone(), relay.name.run_id.clone());
        let connect = connect(caller.clone());
        let hand_over = self.hand_over.clone();
        self.runs.spawn(async move {
            let carried = async {
                let (connection, _running) = tokio::select! {
                    connected = connect => connected?,
                    // Nothing of it runs, but for a claim that was granted just now.
                    () = caller.closed() => return Ok(()),
                };
                relay.run(connection, requests).await
            };
            let carried = tokio::select! {
                carried = carried => carried,
                // Its run goes on, if it has begun.
                () = hand_over.cancelled() => Err(Error::Stopping),
            };
            if let Err(error) = carried {
                tracing::warn!(run_id, error = %crate::chain(&error), "run broken off");
                let _gone = caller.send(Err(error)).await;
            }
        });
    }
}
