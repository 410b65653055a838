//! What any gRPC client may ask of a shim besides runs.

use polydev_tests::shim::Shim;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

#[test]
fn health_and_reflection_answer() {
    let shim = Shim::dev(&["anthropic=0"]);
    let address = shim.address.clone();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let endpoint = tonic::transport::Endpoint::from_shared(address).unwrap();
        let channel = endpoint.connect().await.unwrap();

        let service = "polydev.runtime.v1.RuntimeService".to_owned();
        let health = HealthClient::new(channel.clone())
            .check(HealthCheckRequest {
                service: service.clone(),
            })
            .await
            .unwrap();
        assert_eq!(health.into_inner().status(), ServingStatus::Serving);

        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::FileContainingSymbol(service)),
        };
        let requests = tokio_stream::once(request);
        let answers = ServerReflectionClient::new(channel)
            .server_reflection_info(requests)
            .await;
        let answer = answers
            .unwrap()
            .into_inner()
            .message()
            .await
            .unwrap()
            .unwrap();
        match answer.message_response {
            Some(MessageResponse::FileDescriptorResponse(files)) => {
                assert!(!files.file_descriptor_proto.is_empty());
            }
            other => panic!("{other:?}"),
        }
    });
}
