//! The host's last call.

use polydev_proto::goplugin::{Empty, grpc_controller_server::GrpcController};
use tokio::{
    sync::mpsc,
    time::{Duration, sleep},
};
use tonic::{Request, Response, Status};

/// Long enough for the answer to reach the host, far below its two seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(20);

pub(super) struct Controller {
    pub(super) leave: mpsc::Sender<()>,
}

#[tonic::async_trait]
impl GrpcController for Controller {
    /// Answers first and leaves then: a host that gets no answer waits for ever.
    async fn shutdown(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        let leave = self.leave.clone();
        tokio::spawn(async move {
            sleep(ANSWER_TIMEOUT).await;
            let _leaving_already = leave.try_send(());
        });
        Ok(Response::new(Empty {}))
    }
}
