//! The host's last call, `Shutdown`.

use polydev_proto::goplugin::{Empty, grpc_controller_server::GrpcController};
use tokio::{
    sync::mpsc,
    time::{Duration, sleep},
};
use tonic::{Request, Response, Status};

/// Long enough for the response to reach the host, and well below its two seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(20);

pub(super) struct Controller {
    pub(super) leave: mpsc::Sender<()>,
}

#[tonic::async_trait]
impl GrpcController for Controller {
    /// Responds before the plugin stops: a host without a response waits forever.
    async fn shutdown(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        let leave = self.leave.clone();
        tokio::spawn(async move {
            sleep(ANSWER_TIMEOUT).await;
            let _leaving_already = leave.try_send(());
        });
        Ok(Response::new(Empty {}))
    }
}
