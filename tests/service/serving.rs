//! What any gRPC client may request of a shim, and how a shim ends.

use nix::sys::signal::Signal;
use polydev_proto::runtime::{RunStart, run_event::Event};
use polydev_tests::{client::Events, shim::Shim, wait_until};
use tokio::runtime::Runtime;
use tonic::{Code, Status, transport::Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::site::{LIMIT, Site, reason, seconds, steps};

const SERVICE: &str = "polydev.runtime.v1.RuntimeService";

#[test]
fn health_is_told() {
    let site = Site::empty(&[]);
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let endpoint = Endpoint::from_shared(site.shim.address.clone()).unwrap();
        let channel = endpoint.connect().await.unwrap();
        let service = SERVICE.to_owned();
        let request = HealthCheckRequest { service };
        let health = HealthClient::new(channel).check(request).await.unwrap();
        assert_eq!(health.into_inner().status(), ServingStatus::Serving);
    });
}

#[test]
fn reflection_answers() {
    let site = Site::empty(&[]);
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let endpoint = Endpoint::from_shared(site.shim.address.clone()).unwrap();
        let channel = endpoint.connect().await.unwrap();
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::FileContainingSymbol(SERVICE.to_owned())),
        };
        let answers = ServerReflectionClient::new(channel)
            .server_reflection_info(tokio_stream::once(request))
            .await;
        let answer = answers.unwrap().into_inner().message().await.unwrap();
        match answer.unwrap().message_response {
            Some(MessageResponse::FileDescriptorResponse(files)) => {
                assert!(!files.file_descriptor_proto.is_empty());
            }
            other => panic!("{other:?}"),
        }
    });
}

fn reads(words: &[&str]) -> RunStart {
    RunStart {
        stdin: true,
        queue_timeout: seconds(60),
        ..steps(words)
    }
}

/// The error that a stream ends with.
fn error_of(client: &polydev_tests::client::Client, events: &mut Events) -> Status {
    loop {
        match client.next_of(events) {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without an error"),
            Err(status) => return status,
        }
    }
}

/// Another shim reports the runs that continue.
#[test]
fn a_shim_that_stops_hands_over_what_goes_on() {
    let mut site = Site::start_with(&[("anthropic", 1)], &["--stop-timeout", "0"]);
    let client = site.shim.client();
    let mut run = client.start(reads(&["out:before ", "cat"])).unwrap();
    while !matches!(client.next(&mut run).unwrap(), Some(Event::Stdout(_))) {}
    let (_input, mut waiting) = client.submit(reads(&["true"])).unwrap();
    assert!(matches!(
        client.next_of(&mut waiting),
        Ok(Some(Event::Queued(_)))
    ));

    let other = Shim::serve(&site.nomad().address);
    site.shim.process.signal(Signal::SIGTERM);
    for events in [&mut run.events, &mut waiting] {
        let status = error_of(&client, events);
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        assert_eq!(reason(&status), "STOPPING");
    }
    let exited = wait_until("its end", LIMIT, || {
        site.shim.process.exit().ok_or("still running".to_owned())
    });
    assert!(exited.success());
    assert!(site.node().asked().cancels.is_empty());

    let client = other.client();
    wait_until("the other shim's nodes", LIMIT, || {
        let run = client.get_run(&run.accepted.run_id);
        run.map(drop).map_err(|status| status.to_string())
    });
    let mut again = client.attach(&run.accepted.run_id, [0; 2]).unwrap();
    again.close();
    assert_eq!(client.finish(again).unwrap().stdout(), "before ");
}

/// A shim keeps nothing: its nodes know the runs.
#[test]
fn a_shim_that_is_killed_and_started_finds_its_runs() {
    let mut site = Site::start(&[("anthropic", 1)]);
    let run = site.shim.client().start(reads(&["out:before ", "cat"]));
    let run_id = run.unwrap().accepted.run_id;
    site.shim.process.end(Signal::SIGKILL);
    site.shim.restart();
    site.wait_nodes(1, 0);
    let client = site.shim.client();
    let mut again = client.attach(&run_id, [0; 2]).unwrap();
    again.close();
    assert_eq!(client.finish(again).unwrap().stdout(), "before ");
    assert!(site.node().asked().cancels.is_empty());
}
