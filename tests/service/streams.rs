//! The stream of a run whose node goes away and comes back, or no longer knows the run.

use std::thread;

use polydev_proto::runtime::{
    ExitReason, GetClusterStatusRequest, InputFile, ListRunsRequest, RunStart, input_file::Source,
    run_event::Event, run_input::Input,
};
use polydev_tests::client::{Client, Run};
use tonic::{Code, Status};
use uuid::Uuid;

use crate::site::{Site, reason, steps};

fn reads(words: &[&str]) -> RunStart {
    RunStart {
        stdin: true,
        ..steps(words)
    }
}

/// Reads until the run has printed something. Returns the number of bytes.
fn first_output(client: &Client, run: &mut Run) -> usize {
    loop {
        match client.next(run).expect("another event") {
            Some(Event::Stdout(output)) => return output.data.len(),
            Some(_) => {}
            None => panic!("no output came"),
        }
    }
}

#[track_caller]
fn is_refused<T>(answer: Result<T, Status>, code: Code, expected: &str) {
    let status = answer.err().expect("a refusal");
    assert_eq!(status.code(), code, "{status}");
    assert_eq!(reason(&status), expected, "{status}");
}

/// No byte is lost or arrives twice, in either direction.
#[test]
fn a_stream_that_breaks_is_taken_up_where_it_was() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let mut run = client.start(reads(&["out:before ", "cat"])).unwrap();
    let read = first_output(&client, &mut run);
    client.send(&run, Input::Stdin("one ".into()));
    site.node().leave();
    site.wait_nodes(0, 1);
    client.send(&run, Input::Stdin("two".into()));
    site.node().obey();
    run.close();
    let outcome = client.finish_from(run, [read, 0]).unwrap();
    let whole = format!("{}{}", &"before "[..read], outcome.stdout());
    assert_eq!(whole, "before one two");
}

/// The node has lost the run: nobody knows how far the run came.
#[test]
fn a_run_that_its_node_forgets_is_lost() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let mut run = client.start(reads(&["out:before", "cat"])).unwrap();
    first_output(&client, &mut run);
    site.node().forget(&run.accepted.run_id);
    site.node().break_connections();
    is_refused(client.finish(run), Code::Aborted, "CONNECTION_LOST");
}

/// The run's claim had no effect after all, and every caller learns that.
#[test]
fn a_run_that_was_not_begun_may_be_tried_again() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let file = InputFile {
        path: "never".into(),
        mode: 0,
        source: Some(Source::Size(1)),
    };
    let start = RunStart {
        files: vec![file],
        ..steps(&["true"])
    };
    let run = client.start(start).unwrap();
    let run_id = run.accepted.run_id.clone();
    site.node().give_up(&run_id);
    is_refused(client.finish(run), Code::Unavailable, "NOT_RUN");
    let attached = client.attach(&run_id, [0; 2]);
    is_refused(attached, Code::FailedPrecondition, "NOT_STARTED");
}

/// A caller that goes away does not change its run.
#[test]
fn a_caller_that_comes_back_finds_every_byte() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let mut run = client.start(reads(&["lines:50000", "cat"])).unwrap();
    let run_id = run.accepted.run_id.clone();
    let read = first_output(&client, &mut run);
    drop(run);
    assert!(site.node().asked().cancels.is_empty());
    let mut run = client.attach(&run_id, [read, 0]).unwrap();
    run.close();
    let outcome = client.finish_from(run, [read, 0]).unwrap();
    let lines: String = (1..=50_000).map(|line| format!("{line}\n")).collect();
    assert!(outcome.stdout() == lines[read..]);
}

#[test]
fn a_run_that_is_cancelled_ends_with_that_reason() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let run = client.start(steps(&["wait"])).unwrap();
    client.cancel(&run.accepted.run_id).unwrap();
    let outcome = client.finish(run).unwrap();
    assert_eq!(outcome.exited.reason(), ExitReason::Cancelled);
    let cancel = site.node().asked().cancels.remove(0);
    assert_eq!((&*cancel.user_id, &*cancel.reason), ("tester", ""));
}

#[test]
fn what_cannot_be_attached_to_is_told_why() {
    let mut site = Site::start(&[("anthropic", 1)]);
    site.add_node(Default::default(), &[]);
    let client = site.shim.client();
    let run_id = client.run(steps(&["out:four"])).unwrap().accepted.run_id;
    let others = client.attach_as("mallory", &run_id, [0; 2]);
    is_refused(others, Code::PermissionDenied, "OTHER_USER");
    for refused in [
        client.get_run_as("mallory", &run_id).map(drop),
        client.cancel_as("mallory", &run_id),
    ] {
        is_refused(refused, Code::PermissionDenied, "OTHER_USER");
    }
    is_refused(
        client.attach(&run_id, [5, 0]),
        Code::OutOfRange,
        "BEYOND_END",
    );
    let unknown = Uuid::now_v7().to_string();
    let attach = || client.attach(&unknown, [0; 2]);
    is_refused(attach(), Code::NotFound, "UNKNOWN_RUN");
    is_refused(client.cancel(&unknown), Code::NotFound, "UNKNOWN_RUN");
    is_refused(client.get_run(&unknown), Code::NotFound, "UNKNOWN_RUN");
    // An absent node may have the run.
    site.nodes[1].leave();
    site.wait_nodes(1, 1);
    is_refused(attach(), Code::Unavailable, "NODE_UNREACHABLE");
    client.attach(&run_id, [4, 0]).unwrap();
    site.node().leave();
    site.wait_nodes(0, 2);
    is_refused(attach(), Code::Unavailable, "NODE_UNREACHABLE");
}

/// A node that does not answer delays others only briefly, and the shim names the node.
#[test]
fn a_node_that_stalls_is_named_beside_the_answers_of_the_others() {
    let mut site = Site::start(&[("anthropic", 1)]);
    site.add_node(Default::default(), &[]);
    let client = site.shim.client();
    let run_id = client.run(steps(&["true"])).unwrap().accepted.run_id;
    let stalled = site.nodes[1].id().to_owned();
    site.nodes[1].stall();
    thread::scope(|scope| {
        scope.spawn(|| {
            let client = site.shim.client();
            let listed = client.list_runs(ListRunsRequest::default()).unwrap();
            assert_eq!(listed.nodes_unreachable, std::slice::from_ref(&stalled));
            assert_eq!(listed.runs[0].run_id, run_id);
        });
        scope.spawn(|| {
            let client = site.shim.client();
            let request = GetClusterStatusRequest {};
            let status = client.call(async |mut shim| shim.get_cluster_status(request).await);
            let status = status.unwrap();
            let named = |node_id: &str| {
                let mut nodes = status.nodes.iter();
                let node = nodes.find(|node| node.node_id == node_id);
                node.expect("the node is listed").reachable
            };
            assert!(named(site.node().id()) && !named(&stalled));
        });
        let unknown = Uuid::now_v7().to_string();
        let shown = client.get_run(&unknown);
        is_refused(shown, Code::Unavailable, "NODE_UNREACHABLE");
    });
    // The answer of the node that has the run is enough.
    client.get_run(&run_id).unwrap();
}
