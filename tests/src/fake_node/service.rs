//! The API `polydev.node.v1` of a simulated node.

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, StreamExt, stream};
use polydev_proto::node::{
    AnswerToolCallRequest, AnswerToolCallResponse, AttachRequest, AttachResponse, CancelRunRequest,
    CancelRunResponse, ClaimRequest, ClaimResponse, FenceRequest, FenceResponse, GetNodeRequest,
    GetNodeResponse, GetRunRequest, GetRunResponse, LeaseRequest, LeaseResponse, ListImagesRequest,
    ListImagesResponse, ListRunsRequest, ListRunsResponse, PruneImagesRequest, PruneImagesResponse,
    ReleaseRequest, ReleaseResponse, RunInput, WatchRefreshedRequest, WatchRefreshedResponse,
    WatchRunsRequest, WatchRunsResponse, WatchSlotsRequest, WatchSlotsResponse,
    WatchToolCallsRequest, WatchToolCallsResponse, attach_request, claim_request,
    node_service_server::NodeService, slot::State,
};
use tokio_stream::wrappers::BroadcastStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Node, brief, follow::Follower, run::Run, slots::START_ID};

pub(super) type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl NodeService for Node {
    type WatchSlotsStream = Responses<WatchSlotsResponse>;
    type ClaimStream = Responses<ClaimResponse>;
    type AttachStream = Responses<AttachResponse>;
    type WatchRunsStream = Responses<WatchRunsResponse>;
    type WatchToolCallsStream = Responses<WatchToolCallsResponse>;
    type WatchRefreshedStream = Responses<WatchRefreshedResponse>;

    async fn watch_slots(
        &self,
        _: Request<WatchSlotsRequest>,
    ) -> Result<Response<Self::WatchSlotsStream>, Status> {
        Ok(Response::new(Box::pin(self.slots.watch())))
    }

    async fn claim(
        &self,
        request: Request<Streaming<ClaimRequest>>,
    ) -> Result<Response<Self::ClaimStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|first| first.message);
        let Some(claim_request::Message::Claim(claim)) = first else {
            return Err(Status::invalid_argument("no claim"));
        };
        if !self.keeps {
            return brief::answer(self, *claim).map(Response::new);
        }
        self.knobs.answers().await;
        let run = self.claimed(*claim)?;
        let follower = Follower::new(run.clone(), [0; 3])?;
        let inputs = requests.filter_map(|request| {
            std::future::ready(match request.map(|request| request.message) {
                Ok(Some(claim_request::Message::Input(input))) => Some(input),
                _ => None,
            })
        });
        tokio::spawn(take_input(inputs, run));
        let responses = follower.events().map(|event| {
            Ok(ClaimResponse {
                event: Some(event?),
            })
        });
        Ok(Response::new(Box::pin(responses)))
    }

    async fn attach(
        &self,
        request: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|first| first.message);
        let Some(attach_request::Message::Attach(attach)) = first else {
            return Err(Status::invalid_argument("no attach"));
        };
        self.knobs.answers().await;
        let run = self.book.find(&attach.run_id, Some(&attach.user_id))?;
        let offsets = [
            attach.stdout_offset,
            attach.stderr_offset,
            attach.artifact_offset,
        ];
        let follower = Follower::new(run.clone(), offsets)?;
        let inputs = requests.filter_map(|request| {
            std::future::ready(match request.map(|request| request.message) {
                Ok(Some(attach_request::Message::Input(input))) => Some(input),
                _ => None,
            })
        });
        tokio::spawn(take_input(inputs, run));
        let responses = follower.events().map(|event| {
            Ok(AttachResponse {
                event: Some(event?),
            })
        });
        Ok(Response::new(Box::pin(responses)))
    }

    async fn cancel_run(
        &self,
        request: Request<CancelRunRequest>,
    ) -> Result<Response<CancelRunResponse>, Status> {
        self.knobs.answers().await;
        let request = request.into_inner();
        self.note(|asked| asked.cancels.push(request.clone()));
        let run = self.book.find(&request.run_id, user(&request.user_id))?;
        run.cancel(&request.reason);
        Ok(Response::new(CancelRunResponse {}))
    }

    async fn get_run(
        &self,
        request: Request<GetRunRequest>,
    ) -> Result<Response<GetRunResponse>, Status> {
        self.knobs.answers().await;
        let GetRunRequest { run_id, user_id } = request.into_inner();
        let run = self.book.find(&run_id, user(&user_id))?;
        Ok(Response::new(GetRunResponse {
            run: Some(run.describe()),
        }))
    }

    async fn list_runs(
        &self,
        request: Request<ListRunsRequest>,
    ) -> Result<Response<ListRunsResponse>, Status> {
        self.knobs.answers().await;
        let runs = self.book.list(request.get_ref());
        Ok(Response::new(ListRunsResponse { runs }))
    }

    async fn watch_runs(
        &self,
        request: Request<WatchRunsRequest>,
    ) -> Result<Response<Self::WatchRunsStream>, Status> {
        self.knobs.answers().await;
        let WatchRunsRequest { user_id, provider } = request.into_inner();
        let steps = BroadcastStream::new(self.book.steps());
        let fits = move |run: &polydev_proto::node::Run| {
            (user_id.is_empty() || run.user_id == user_id)
                && (provider.is_empty() || run.provider == provider)
        };
        let first = WatchRunsResponse {
            runs: self.book.all().into_iter().filter(&fits).collect(),
            snapshot: true,
            ..WatchRunsResponse::default()
        };
        let book = self.book.clone();
        let rest = steps.filter_map(move |step| {
            // A watcher that is behind misses steps.
            let run = step.ok().and_then(|run_id| book.find(&run_id, None).ok());
            let run = run.map(|run| run.describe()).filter(&fits);
            std::future::ready(run.map(|run| {
                Ok(WatchRunsResponse {
                    runs: vec![run],
                    ..WatchRunsResponse::default()
                })
            }))
        });
        Ok(Response::new(Box::pin(
            stream::iter([Ok(first)]).chain(rest),
        )))
    }

    async fn watch_refreshed(
        &self,
        _: Request<WatchRefreshedRequest>,
    ) -> Result<Response<Self::WatchRefreshedStream>, Status> {
        Ok(Response::new(Box::pin(stream::pending())))
    }

    async fn watch_tool_calls(
        &self,
        _: Request<WatchToolCallsRequest>,
    ) -> Result<Response<Self::WatchToolCallsStream>, Status> {
        Ok(Response::new(Box::pin(stream::pending())))
    }

    async fn answer_tool_call(
        &self,
        _: Request<AnswerToolCallRequest>,
    ) -> Result<Response<AnswerToolCallResponse>, Status> {
        Err(Status::not_found("no such call waits"))
    }

    async fn fence(
        &self,
        request: Request<FenceRequest>,
    ) -> Result<Response<FenceResponse>, Status> {
        let request = request.into_inner();
        // Also while the node stalls, so that a test sees the shim's request.
        self.note(|asked| asked.fences.push(request.clone()));
        self.knobs.answers().await;
        Ok(Response::new(self.book.fence(&request)))
    }

    async fn lease(
        &self,
        request: Request<LeaseRequest>,
    ) -> Result<Response<LeaseResponse>, Status> {
        let request = request.into_inner();
        self.note(|asked| asked.leases.push(request.clone()));
        self.knobs.answers().await;
        self.knobs.refusal()?;
        if request.start_id != START_ID {
            return Err(Status::failed_precondition("another start of the driver"));
        }
        let expires_at = Some(self.slots.lease(&request)?);
        Ok(Response::new(LeaseResponse { expires_at }))
    }

    async fn release(
        &self,
        request: Request<ReleaseRequest>,
    ) -> Result<Response<ReleaseResponse>, Status> {
        let request = request.into_inner();
        self.note(|asked| asked.releases.push(request.clone()));
        self.knobs.answers().await;
        self.slots.release(&request)?;
        Ok(Response::new(ReleaseResponse {}))
    }

    async fn get_node(
        &self,
        _: Request<GetNodeRequest>,
    ) -> Result<Response<GetNodeResponse>, Status> {
        self.knobs.answers().await;
        let [slots, idle] = self.slots.count(State::Idle);
        let [_, claimed] = self.slots.count(State::Claimed);
        Ok(Response::new(GetNodeResponse {
            version: "fake".into(),
            slots,
            idle,
            claimed,
            runs: claimed,
            ..GetNodeResponse::default()
        }))
    }

    async fn list_images(
        &self,
        _: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        self.knobs.answers().await;
        Ok(Response::new(ListImagesResponse::default()))
    }

    async fn prune_images(
        &self,
        _: Request<PruneImagesRequest>,
    ) -> Result<Response<PruneImagesResponse>, Status> {
        Err(Status::unavailable("there is no Docker"))
    }
}

/// `None` is the operator.
fn user(user_id: &str) -> Option<&str> {
    Some(user_id).filter(|user_id| !user_id.is_empty())
}

/// Takes input until the shim closes its side or goes away, or the run is over.
async fn take_input(inputs: impl Stream<Item = RunInput> + Send, run: Arc<Run>) {
    let mut inputs = std::pin::pin!(inputs);
    loop {
        tokio::select! {
            input = inputs.next() => match input {
                Some(input) => run.input(input),
                None => return,
            },
            () = run.over() => return,
        }
    }
}
