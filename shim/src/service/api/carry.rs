//! Admits a call's run, connects it, and relays it in a task beside the call.

use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt};
use opentelemetry::{Context, context::FutureExt};
use polydev_proto::{
    id::{RunId, UserId},
    node::TraceContext,
    provider::Provider,
    runtime::{RunEvent, RunStart, run_start::Command},
    stream::PerStream,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tracing::{Instrument, Span};

use super::Api;
use crate::{
    access::{Action, Caller, Denied, TooMuch, What},
    approval::wanted::{Subject, Wanted, Who},
    audit::record::{Operation, Record},
    credentials::record::Binding,
    policy::Leave,
    run::{
        Connection, Error,
        attach::Name,
        queue::Running,
        relay::{self, Relay},
        request::{self, Own, facts},
    },
};

impl Api {
    /// Checks a run before any driver is asked, and gets its credential.
    pub(super) async fn admit(
        &self,
        mut start: RunStart,
        trace: Option<TraceContext>,
        caller: &Caller,
    ) -> Result<request::Request, Error> {
        let provider = start.provider.parse().map_err(request::Invalid::from)?;
        let user_id = request::parse_user(start.user_id.clone())?;
        let what = match start.command {
            Some(Command::Prompt(_)) => What::Prompt,
            Some(Command::Argv(_)) | None => What::Command,
        };
        let run = Action::Run {
            what,
            user_id: Some(user_id.as_str()),
            provider: Some(provider),
        };
        let record = Record::new(caller, Operation::Start)
            .user(user_id.as_str())
            .run(&start.run_id)
            .provider(provider.name());
        let denied = |too_much: TooMuch| {
            let denied = Denied {
                caller: caller.to_string(),
                what: too_much.to_string(),
            };
            self.denied(&record, denied)
        };
        let mut role = self.role(caller, run, &record)?;
        let asked = role.limit(&mut start).map_err(denied)?;
        let asked_policy = self.policy.is_on().then(|| facts::asked(&start));
        let mut request = request::Request::parse(start, trace)?;
        let started = record.clone().run(&request.run_id.to_string());
        let has_credential = request.credential.is_some();
        let (user_id, provider) = (&request.user_id, request.provider);
        self.user_rate.check(user_id.as_str())?;
        if let Some((vendor, source)) = request.credential.take() {
            let binding = Binding {
                user_id,
                provider: vendor,
            };
            let is_given = source.is_given();
            if source.is_unbound() {
                let user_id = user_id.as_str();
                let unbound = started.with(Operation::Unbound);
                self.permit(caller, Action::Unbound { user_id, provider }, &unbound)?;
            }
            let secrets = self
                .vault
                .prepare(source, binding, request.mode, request.run_id);
            let secrets = secrets.await?;
            if secrets.outside.is_none() {
                let inject = Action::Inject {
                    what,
                    user_id: user_id.as_str(),
                    provider,
                    is_given,
                };
                let injected = started.with(Operation::Inject);
                role = self.role(caller, inject, &injected)?;
                self.audit.record(&injected)?;
                // It may be another one.
                role.allows(&asked).map_err(denied)?;
            }
            request.equip(secrets)?;
        }
        request.role = role;
        request.caller = Who {
            name: caller.name.clone(),
            user: caller.user.clone(),
        };
        let facts = asked_policy.map(|facts| request.facts(facts, caller, has_credential));
        let (started, leave) = self.decide(started, facts.as_ref())?;
        let allowing = started.policy.as_ref().and_then(|policy| policy.allowing());
        request.permission = self.signer.permission(allowing);
        match facts.filter(|_| leave == Leave::NeedsApproval) {
            // Its start is recorded once somebody has approved it.
            Some(facts) => {
                request.wanted = Some(Wanted {
                    record: started,
                    who: request.caller.clone(),
                    subject: Subject::Run(facts.into()),
                });
            }
            None => self.audit.record(&started)?,
        }
        if !request.is_retry {
            // It would wait for nothing. A run that exists already is found by its claim.
            request.terms().policy(&self.view)?;
        }
        Ok(request)
    }

    pub(super) fn relay(
        &self,
        name: Name,
        received: Instant,
        offsets: PerStream<u64>,
        own_input: Option<Own>,
        longest: Duration,
    ) -> (
        Relay,
        impl Stream<Item = Result<RunEvent, Status>> + Send + use<>,
    ) {
        let (caller, events) = mpsc::channel(relay::MAX_EVENTS);
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

    /// Connects a run and relays it, in a task that a stopping shim waits for. Log lines about it
    /// belong to the trace of `context`.
    pub(super) fn carry<F>(
        &self,
        relay: Relay,
        span: Span,
        context: Context,
        inputs: relay::Inputs,
        connect: impl FnOnce(mpsc::Sender<Result<RunEvent, Error>>) -> F,
    ) where
        F: Future<Output = Result<(Connection, Option<Running>), Error>> + Send + 'static,
    {
        let (caller, run_id) = (relay.caller.clone(), relay.name.run_id);
        let connect = connect(caller.clone());
        let hand_over = self.hand_over.clone();
        let carry = async move {
            let carried = async {
                let (connection, _running) = tokio::select! {
                    connected = connect => connected?,
                    // Nothing of the run has started, except a claim that was granted just now.
                    () = caller.closed() => return Ok(()),
                };
                relay.run(connection, inputs).await
            };
            let carried = tokio::select! {
                carried = carried => carried,
                // A run that has started continues.
                () = hand_over.cancelled() => Err(Error::Stopping),
            };
            if let Err(error) = carried {
                tracing::warn!(%run_id, error = %crate::chain(&error), "the run's relay failed");
                let _gone = caller.send(Err(error)).await;
            }
        };
        self.runs
            .spawn(carry.instrument(span).with_context(context));
    }

    /// Does the work of a call that has no events. A stopping shim waits for this work, up to a
    /// deadline.
    pub(super) async fn unless_stopping<T>(
        &self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let work = async {
            tokio::select! {
                done = work => done,
                () = self.hand_over.cancelled() => Err(Error::Stopping),
            }
        };
        self.runs.track_future(work).await
    }
}

/// The span for all log lines about a run. `provider` is `None` if only the driver knows the
/// provider.
pub(super) fn span(run_id: RunId, user_id: &UserId, provider: Option<Provider>) -> Span {
    let provider = provider.map(Provider::name);
    tracing::info_span!("run", %run_id, %user_id, provider)
}
