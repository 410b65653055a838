//! The calls about runs and leases as gRPC and HTTP both have them: who may, and then what is
//! done.

use std::{collections::VecDeque, time::Instant};

use futures_util::Stream;
use polydev_proto::{
    node::TraceContext,
    runtime::{
        Accepted, AllocateRequest, AllocateResponse, CancelRunRequest, CancelRunResponse,
        ListRunsRequest, ListRunsResponse, ReleaseRequest, ReleaseResponse, RunEvent, RunStart,
    },
};
use tokio::sync::mpsc;
use tonic::Status;

use super::{Service, runs, without_stdin};
use crate::{
    access::{Action, Caller},
    run::{
        Error,
        attach::{self, Name},
        claim,
        input::{self, Input},
        lease::{self, Wanted},
        relay::{self, Inputs},
        request,
    },
};

impl Service {
    /// Runs a command, and tells its id and events.
    pub(super) async fn run_of(
        &self,
        start: RunStart,
        trace: Option<TraceContext>,
        caller: &Caller,
        received: Instant,
        requests: Inputs,
    ) -> Result<
        (
            String,
            impl Stream<Item = Result<RunEvent, Status>> + Send + use<>,
        ),
        Error,
    > {
        let mut request = self.admit(start, trace, caller).await?;
        let longest = request.longest();
        let name = Name {
            run_id: request.run_id.to_string(),
            user_id: request.user_id.clone(),
        };
        let own = request.own_input.take();
        let run_id = name.run_id.clone();
        let (relay, events) = self.relay(name, received, [0; 3], own, longest);
        let (view, queue, on_demand) = (
            self.view.clone(),
            self.queue.clone(),
            self.on_demand.clone(),
        );
        self.carry(relay, requests, |caller| async move {
            claim::claim(&view, &queue, &on_demand, request, &caller).await
        });
        Ok((run_id, events))
    }

    /// Starts a command, with all that it reads.
    pub(super) async fn submit(
        &self,
        start: RunStart,
        trace: Option<TraceContext>,
        caller: &Caller,
    ) -> Result<Accepted, Error> {
        let start = without_stdin(start)?;
        let claim = async {
            let mut request = self.admit(start, trace, caller).await?;
            let run_id = request.run_id.to_string();
            let own = request.own_input.take();
            // Nobody is told its place.
            let (told, _) = mpsc::channel(1);
            let (mut connection, running) =
                claim::claim(&self.view, &self.queue, &self.on_demand, request, &told).await?;
            let accepted = relay::accepted(run_id, &connection);
            if let Some(own) = own {
                let input = Input::new(&connection, Some(own));
                // Also if the caller does not wait for the answer.
                self.runs.spawn(async move {
                    let _running = running;
                    input::feed(&mut connection, input, VecDeque::new()).await;
                });
            }
            Ok(accepted)
        };
        self.unless_stopping(claim).await
    }

    /// Goes on with a run, and tells its events.
    pub(super) async fn attach_to(
        &self,
        name: Name,
        offsets: [u64; 3],
        caller: &Caller,
        received: Instant,
        requests: Inputs,
    ) -> Result<impl Stream<Item = Result<RunEvent, Status>> + Send + use<>, Error> {
        self.check_run(caller, &name).await?;
        let connection = attach::attach(&self.view, &name, offsets).await?;
        // Its deadline is the driver's to know.
        let (relay, events) = self.relay(name, received, offsets, None, request::LONGEST);
        self.carry(relay, requests, |_| async { Ok((connection, None)) });
        Ok(events)
    }

    pub(super) async fn cancel(
        &self,
        CancelRunRequest { run_id, user_id }: CancelRunRequest,
        caller: &Caller,
    ) -> Result<CancelRunResponse, Error> {
        let name = Name::parse(&run_id, user_id)?;
        self.check_run(caller, &name).await?;
        attach::cancel(&self.view, &name).await?;
        Ok(CancelRunResponse {})
    }

    pub(super) async fn list_of(
        &self,
        request: ListRunsRequest,
        caller: &Caller,
    ) -> Result<ListRunsResponse, Error> {
        self.check_runs(caller, &request.user_id, &request.provider)?;
        runs::list(&self.view, request).await
    }

    pub(super) async fn allocate_for(
        &self,
        request: AllocateRequest,
        caller: &Caller,
    ) -> Result<AllocateResponse, Error> {
        let wanted = Wanted::parse(request)?;
        let (user_id, provider) = (wanted.user_id.clone(), wanted.provider);
        let run = Action::Run {
            user_id: Some(&user_id),
            provider: Some(provider),
        };
        self.check(caller, run)?;
        self.user_rate.check(&user_id)?;
        let allocate = lease::allocate(&self.view, &self.queue, wanted);
        let lease = self.unless_stopping(allocate).await?;
        tracing::info!(lease_id = lease.lease_id, %caller, %provider, user_id, "lease");
        let lease = Some(lease);
        Ok(AllocateResponse { lease })
    }

    /// A shim that stops waits for it, for a time.
    async fn unless_stopping<T>(
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

    pub(super) async fn release_of(
        &self,
        ReleaseRequest { lease_id, user_id }: ReleaseRequest,
        caller: &Caller,
    ) -> Result<ReleaseResponse, Error> {
        let name = Name::parse_lease(&lease_id, user_id)?;
        let kept = self.view.leased(&name.run_id);
        let run = Action::Run {
            user_id: Some(&name.user_id),
            provider: kept.as_ref().and_then(|kept| kept.provider.parse().ok()),
        };
        self.check(caller, run)?;
        lease::release(&self.view, kept, &name).await?;
        Ok(ReleaseResponse {})
    }
}
