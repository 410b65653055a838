//! The call that runs a script to its end: `RunScript`.

use std::{
    pin::pin,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use polydev_proto::{
    node::TraceContext,
    runtime::{RunScriptRequest, RunScriptResponse},
};
use polydev_transport::backoff::Backoff;
use tokio::{sync::oneshot, time::sleep};
use tonic::{Code, Status};

use super::Api;
use crate::{
    access::Caller,
    pool::View,
    run::{
        Error,
        attach::{self, Name},
        script,
    },
};

/// A claim may be on its way to a node, which then knows the run a moment later.
const MAX_TRIES: usize = 5;
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(5);

impl Api {
    /// # Cancel safety
    /// A call that is dropped ends its script.
    pub(in crate::service) async fn run_script(
        &self,
        caller: &Caller,
        request: RunScriptRequest,
        trace: Option<TraceContext>,
        received: Instant,
    ) -> Result<RunScriptResponse, Status> {
        let (start, mut outcome) = script::start(request).map_err(Error::from)?;
        let user_id = start.user_id.clone().into();
        let (run_id, events) = self.run(caller, start, trace, received, None).await?;
        let (is_over, over) = oneshot::channel();
        let (view, name) = (self.view.clone(), Name { run_id, user_id });
        self.runs.spawn(async move {
            if over.await.is_err() {
                end(&view, &name).await;
            }
        });
        let mut events = pin!(events);
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => outcome.take(event),
                Err(status) => {
                    // It has not run, or there was no slot for it: no node need be asked.
                    if status.code() == Code::ResourceExhausted {
                        let _nobody_waits = is_over.send(());
                    }
                    return Err(status);
                }
            }
        }
        let _nobody_waits = is_over.send(());
        Ok(outcome.result())
    }
}

/// Ends the script of a call that is gone. One that no node knows has not started.
async fn end(view: &View, name: &Name) {
    let mut retry = Backoff::new(RETRY_INTERVAL, MAX_RETRY_INTERVAL);
    let mut last = None;
    for _ in 0..MAX_TRIES {
        match attach::cancel(view, name).await {
            Ok(()) => return,
            Err(error) => last = Some(error),
        }
        sleep(retry.next_wait()).await;
    }
    let error = last.map(|error| crate::chain(&error));
    tracing::info!(run_id = %name.run_id, error, "the script of a call that is gone was not ended: it has not started, or goes on");
}
