//! The call that runs a script to its end: `RunScript`.

use std::{pin::pin, time::Instant};

use futures_util::StreamExt;
use polydev_proto::{
    node::TraceContext,
    runtime::{RunScriptRequest, RunScriptResponse},
};
use tokio::sync::oneshot;
use tonic::Status;

use super::Api;
use crate::{
    access::Caller,
    run::{
        Error,
        attach::{self, Name},
        script,
    },
};

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
            if over.await.is_err()
                && let Err(error) = attach::cancel(&view, &name).await
            {
                let error = crate::chain(&error);
                tracing::info!(%run_id, error, "cannot end the script of a caller that is gone");
            }
        });
        let mut events = pin!(events);
        while let Some(event) = events.next().await {
            outcome.take(event?);
        }
        let _nobody_waits = is_over.send(());
        Ok(outcome.result())
    }
}
