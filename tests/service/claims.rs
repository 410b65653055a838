//! What the shim does after a driver's answer to a claim. After a definite refusal it claims
//! another slot. After an unclear answer it asks the same driver again.

use std::thread;

use polydev_proto::runtime::{ListRunsRequest, RunStart, run_event::Event, run_input::Input};
use polydev_tests::{
    client::{Client, Events},
    fake_node::Loss,
    wait_until,
};
use tonic::Code;
use uuid::Uuid;

use crate::site::{LIMIT, Site, at_once, reason, seconds, steps};

/// Reads events until the run is accepted. Returns the run's node.
fn accepted(client: &Client, events: &mut Events) -> String {
    loop {
        match client.next_of(events).expect("another event") {
            Some(Event::Accepted(accepted)) => return accepted.node_id,
            Some(Event::Queued(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// If the first node refuses a run with this code, the second node gets the run.
fn goes_elsewhere(code: Code) {
    let mut site = Site::start(&[("anthropic", 1)]);
    site.add_node(Default::default(), &[]);
    site.node().refuse(code, "not here");
    let client = site.shim.client();
    let submitted = client.submit(steps(&["true"]));
    let (_input, mut events) = submitted.expect("it is taken");
    site.wait_asked(0, |asked| asked.claims.into_iter().next());
    site.nodes[1].add_slots("anthropic", 1);
    assert_eq!(accepted(&client, &mut events), site.nodes[1].id());

    // Each try has a higher ballot than the previous one.
    let [first, second] = [0, 1].map(|node| site.nodes[node].asked().claims);
    let tries: Vec<_> = first.iter().chain(&second).collect();
    let ballots: Vec<_> = tries.iter().flat_map(|claim| claim.ballot).collect();
    assert!(ballots.is_sorted_by(|a, b| a.attempt < b.attempt && a.nonce == b.nonce));
    assert!(tries.iter().all(|claim| claim.run_id == tries[0].run_id));
}

#[test]
fn a_run_that_is_refused_is_tried_elsewhere() {
    goes_elsewhere(Code::FailedPrecondition);
}

#[test]
fn a_run_that_a_node_may_not_have_is_tried_elsewhere() {
    goes_elsewhere(Code::PermissionDenied);
}

#[test]
fn a_run_that_a_node_has_no_room_for_is_tried_elsewhere() {
    goes_elsewhere(Code::ResourceExhausted);
}

#[test]
fn a_run_that_is_refused_everywhere_is_told_the_nodes_reason() {
    for code in [Code::FailedPrecondition, Code::ResourceExhausted] {
        let site = Site::start(&[("anthropic", 1)]);
        site.node().refuse(code, "the moon is full");
        let refused = site.shim.client().run(at_once(steps(&["true"])));
        let refused = refused.unwrap_err();
        assert_eq!(reason(&refused), "NO_IDLE_SLOT");
        assert!(refused.message().contains("the moon is full"), "{refused}");
    }
}

/// The shim tries both nodes in one turn. A run that does not wait gets the other node, whichever
/// node is tried first.
#[test]
fn a_run_that_one_node_has_no_room_for_is_tried_on_another_in_the_same_turn() {
    let mut site = Site::start(&[("anthropic", 1)]);
    site.add_node(Default::default(), &[("anthropic", 1)]);
    site.node().refuse(Code::ResourceExhausted, "no room");
    let client = site.shim.client();
    wait_until("a try at the full node", LIMIT, || {
        client.wait_idle("anthropic", 2);
        let outcome = client.run(at_once(steps(&["true"]))).unwrap();
        assert_eq!(outcome.accepted.node_id, site.nodes[1].id());
        let tries = site.node().asked().claims.len();
        (tries > 0).then_some(()).ok_or_else(|| tries.to_string())
    });
}

#[test]
fn what_no_slot_would_take_is_not_tried_again() {
    for (code, told) in [
        (Code::InvalidArgument, "REFUSED"),
        (Code::AlreadyExists, "OTHER_COMMAND"),
    ] {
        let site = Site::start(&[("anthropic", 2)]);
        site.node().refuse(code, "never");
        let refused = site.shim.client().run(steps(&["true"])).unwrap_err();
        assert_eq!((refused.code(), &*reason(&refused)), (code, told));
        assert!(refused.message().contains("never"), "{refused}");
        assert_eq!(site.node().asked().claims.len(), 1);
    }
}

/// The node has the run: the shim attaches to the run and does not start it again.
#[test]
fn a_claim_that_was_taken_without_an_answer_is_gone_back_to() {
    let site = Site::start(&[("anthropic", 2)]);
    let client = site.shim.client();
    site.node().lose_next_claim(Loss::Taken);
    let outcome = client.run(steps(&["out:once"])).unwrap();
    assert_eq!(outcome.stdout(), "once");
    let asked = site.node().asked();
    assert_eq!(asked.claims[0].slot_id, outcome.accepted.slot_id);
    assert!(!asked.fences.is_empty(), "the shim did not ask for the run");
    // The connection that broke may not be back yet.
    let listed = wait_until("the node", LIMIT, || {
        let listed = client.list_runs(ListRunsRequest::default());
        listed.map_err(|status| status.to_string())
    });
    assert_eq!(listed.runs.len(), 1);
}

/// The node does not have the run and cannot get it: the fence prevents that.
#[test]
fn a_claim_that_was_not_taken_is_made_again() {
    let site = Site::start(&[("anthropic", 2)]);
    let client = site.shim.client();
    site.node().lose_next_claim(Loss::NotTaken);
    let outcome = client.run(steps(&["out:once"])).unwrap();
    assert_eq!(outcome.stdout(), "once");
    let asked = site.node().asked();
    let ballots = asked.claims.iter().map(|claim| claim.ballot.unwrap());
    let ballots: Vec<_> = ballots.collect();
    let [lost, again] = &ballots[..] else {
        panic!("{asked:?}");
    };
    let fence = asked.fences.last().and_then(|fence| fence.ballot).unwrap();
    assert!(lost.attempt < fence.attempt && fence.attempt < again.attempt);
}

/// The shim asks a stalled driver about the claim as soon as the driver answers again. The claim
/// had no effect, because the shim had given it up.
#[test]
fn a_driver_that_stalls_is_asked_what_became_of_the_claim() {
    let site = Site::start(&[("anthropic", 1)]);
    site.node().stall();
    let start = RunStart {
        queue_timeout: seconds(60),
        ..steps(&["out:once"])
    };
    thread::scope(|scope| {
        let run = scope.spawn(|| site.shim.client().run(start));
        wait_until("the question", 2 * LIMIT, || {
            let asked = site.node().asked();
            let words = || format!("{asked:?}");
            (!asked.fences.is_empty()).then_some(()).ok_or_else(words)
        });
        site.node().obey();
        assert_eq!(run.join().unwrap().unwrap().stdout(), "once");
    });
    let listed = site.shim.client().list_runs(ListRunsRequest::default());
    assert_eq!(listed.unwrap().runs.len(), 1);
}

/// A caller may repeat a claim any number of times.
#[test]
fn a_run_is_begun_once_however_often_it_is_asked_for() {
    let site = Site::start(&[("anthropic", 3)]);
    let client = site.shim.client();
    let run_id = Uuid::now_v7().to_string();
    let start = |attempt, words: &[&str]| RunStart {
        run_id: run_id.clone(),
        attempt,
        stdin: true,
        ..steps(words)
    };
    let mut first = client.start(start(1, &["cat"])).unwrap();
    let again = [0, 1, 2].map(|attempt| client.start(start(attempt, &["cat"])).unwrap());
    for again in &again {
        assert_eq!(again.accepted.slot_id, first.accepted.slot_id);
        assert_eq!(again.accepted.generation, first.accepted.generation);
    }
    for attempt in [0, 1, 2] {
        let other = client.run(start(attempt, &["out:other"])).unwrap_err();
        assert_eq!(other.code(), Code::AlreadyExists, "{other}");
        assert_eq!(reason(&other), "OTHER_COMMAND");
    }
    client.send(&first, Input::Stdin("in".into()));
    first.close();
    assert_eq!(client.finish(first).unwrap().stdout(), "in");
    for again in again {
        assert_eq!(client.finish(again).unwrap().stdout(), "in");
    }
    client.wait_idle("anthropic", 3);
}
