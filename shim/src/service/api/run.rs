//! The calls that start runs, attach to them and end them: `Run`, `SubmitJob`, `Attach` and
//! `CancelRun`.

use std::{collections::VecDeque, time::Instant};

use futures_util::{Stream, StreamExt, stream};
use opentelemetry::Context;
use polydev_proto::{
    id::RunId,
    node::TraceContext,
    runtime::{
        CancelRunRequest, CancelRunResponse, InputFile, RunEvent, RunStart, SubmitJobRequest,
        SubmitJobResponse, input_file, run_event::Event,
    },
    stream::PerStream,
};
use tokio::sync::mpsc;
use tonic::Status;
use tracing::Instrument;

use super::{Api, carry::span};
use crate::{
    access::Caller,
    audit::record::Operation,
    run::{
        Error,
        attach::{self, Name},
        claim,
        input::{self, Input},
        relay::{self, Inputs},
        request::{Invalid, MAX_RUN_TIME},
    },
    traces::Trace,
};

impl Api {
    /// Runs a command. Returns the run's id, and the run's events as they come. `inputs` is what
    /// the caller sends to the command; `None` if the caller cannot send any.
    pub(in crate::service) async fn run(
        &self,
        caller: &Caller,
        start: RunStart,
        trace: Option<TraceContext>,
        received: Instant,
        inputs: Option<Inputs>,
    ) -> Result<
        (
            RunId,
            impl Stream<Item = Result<RunEvent, Status>> + Send + use<>,
        ),
        Error,
    > {
        let (start, inputs) = match inputs {
            Some(inputs) => (start, inputs),
            None => (without_stdin(start)?, silent()),
        };
        let mut request = self.admit(start, trace, caller).await?;
        let (run_id, provider) = (request.run_id, request.provider);
        let caller = request.trace.take();
        let (trace, mut ours) = self.traces.begin(caller, received, run_id, provider);
        request.trace = trace;
        let longest = request.longest();
        let name = Name {
            run_id: request.run_id,
            user_id: request.user_id.clone(),
        };
        let own = request.own_input.take();
        let span = span(run_id, &name.user_id, Some(provider));
        let (relay, events) = self.relay(name, received, PerStream::default(), own, longest);
        let turns = self.turns.clone();
        let context = ours.as_ref().map(Trace::context).unwrap_or_default();
        self.carry(relay, span, context, inputs, |caller| async move {
            claim::claim(&turns, request, &caller).await
        });
        let metrics = self.metrics.clone();
        let mut is_approved = false;
        let events = events.inspect(move |event| match event {
            Ok(RunEvent {
                event: Some(Event::ApprovalRequired(_)),
            }) => is_approved = true,
            // Not the time that somebody took to approve the run.
            Ok(RunEvent {
                event: Some(Event::Accepted(_)),
            }) if is_approved => {}
            Ok(RunEvent {
                event: Some(Event::Accepted(accepted)),
            }) => metrics.claimed(provider, accepted.warm, received.elapsed()),
            Ok(RunEvent {
                event: Some(Event::Exited(exited)),
            }) => {
                metrics.ended(provider, exited);
                if let Some(ours) = ours.take() {
                    ours.end(exited);
                }
            }
            Ok(_) => {}
            Err(status) => {
                if let Some(ours) = ours.take() {
                    ours.fail(status.code());
                }
            }
        });
        Ok((run_id, events))
    }

    /// Starts a command with all its input, and returns when a slot is claimed for the run.
    pub(in crate::service) async fn submit_job(
        &self,
        caller: &Caller,
        SubmitJobRequest { start }: SubmitJobRequest,
        trace: Option<TraceContext>,
    ) -> Result<SubmitJobResponse, Error> {
        let start = without_stdin(start.unwrap_or_default())?;
        let received = Instant::now();
        let claim = async {
            let mut request = self.admit(start, trace, caller).await?;
            let (run_id, provider) = (request.run_id, request.provider);
            let own = request.own_input.take();
            // Nobody receives the run's place in the queue.
            let (told, _) = mpsc::channel(1);
            let span = span(run_id, &request.user_id, Some(request.provider));
            let claim = claim::claim(&self.turns, request, &told);
            let (mut connection, running) = claim.instrument(span.clone()).await?;
            let accepted = relay::accepted(run_id, &connection);
            self.metrics
                .claimed(provider, accepted.warm, received.elapsed());
            if let Some(own) = own {
                let input = Input::new(&connection, Some(own));
                let feed = async move {
                    let _running = running;
                    input::feed(&mut connection, input, VecDeque::new()).await;
                };
                // The input is sent even if the caller does not wait for the answer.
                self.runs.spawn(feed.instrument(span));
            }
            Ok(accepted)
        };
        let accepted = Some(self.unless_stopping(claim).await?);
        Ok(SubmitJobResponse { accepted })
    }

    /// Attaches to a run, from `offsets` of its streams on. Returns the run's
    /// events as they come. `inputs` is as in [`run`](Self::run).
    pub(in crate::service) async fn attach(
        &self,
        caller: &Caller,
        name: Name,
        offsets: PerStream<u64>,
        received: Instant,
        inputs: Option<Inputs>,
    ) -> Result<impl Stream<Item = Result<RunEvent, Status>> + Send + use<>, Error> {
        self.check_run(caller, &name, Operation::Attach).await?;
        let span = span(name.run_id, &name.user_id, None);
        let attach = attach::attach(&self.view, &name, offsets);
        let connection = attach.instrument(span.clone()).await?;
        // Only the driver knows the run's deadline.
        let (relay, events) = self.relay(name, received, offsets, None, MAX_RUN_TIME);
        let inputs = inputs.unwrap_or_else(silent);
        self.carry(relay, span, Context::new(), inputs, |_| async {
            Ok((connection, None))
        });
        Ok(events)
    }

    pub(in crate::service) async fn cancel_run(
        &self,
        caller: &Caller,
        CancelRunRequest { run_id, user_id }: CancelRunRequest,
    ) -> Result<CancelRunResponse, Error> {
        let name = Name::parse(&run_id, user_id)?;
        self.check_run(caller, &name, Operation::Cancel).await?;
        attach::cancel(&self.view, &name).await?;
        Ok(CancelRunResponse {})
    }
}

/// The inputs of a caller that cannot send any and does not end its input either.
fn silent() -> Inputs {
    stream::pending().boxed()
}

/// Checks a run whose caller sends only the start.
fn without_stdin(start: RunStart) -> Result<RunStart, Invalid> {
    if start.stdin {
        return Err(Invalid::Value {
            field: "stdin",
            given: "true".into(),
            allowed: "false: this call cannot send stdin",
        });
    }
    let follows = |file: &InputFile| matches!(file.source, Some(input_file::Source::Size(1..)));
    if start.files.iter().any(follows) {
        return Err(Invalid::Value {
            field: "files",
            given: "some by their size".into(),
            allowed: "files with their `content`: this call cannot send the content later",
        });
    }
    Ok(start)
}
