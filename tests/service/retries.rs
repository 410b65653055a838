//! Runs that are tried again, and runs that go to a node that is newer than the run.

use std::time::{Duration, SystemTime};

use polydev_proto::{
    node::{Ballot, Claim},
    runtime::RunStart,
};
use polydev_tests::fake_node::Options;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::site::{Site, at_once, reason, steps};

/// A try of a run that prints `once`.
fn tried(run_id: &str, attempt: u32) -> RunStart {
    RunStart {
        run_id: run_id.into(),
        attempt,
        ..steps(&["out:once"])
    }
}

fn new_id() -> String {
    Uuid::now_v7().to_string()
}

#[track_caller]
fn may_have_run<T>(answer: Result<T, Status>, node_id: &str) {
    let status = answer.err().expect("a refusal");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert_eq!(reason(&status), "MAY_HAVE_RUN");
    assert!(status.message().contains(node_id), "{status}");
}

/// A repeated request gets the result of the run.
#[test]
fn a_retry_is_answered_with_the_run_that_there_was() {
    let mut site = Site::start(&[("anthropic", 1)]);
    site.add_node(Options::default(), &[("anthropic", 1)]);
    let client = site.shim.client();
    let run_id = new_id();
    let first = client.run(tried(&run_id, 1)).unwrap();
    for attempt in [2, 3, 0] {
        let again = client.run(tried(&run_id, attempt)).unwrap();
        assert_eq!(again.accepted.slot_id, first.accepted.slot_id);
        assert_eq!(again.accepted.generation, first.accepted.generation);
        assert_eq!(again.stdout(), "once");
    }
    // The shim asked every node.
    assert!(site.nodes.iter().all(|node| node.asked().fences.len() == 3));
    let shown = client.get_run(&run_id).unwrap();
    assert_eq!(shown.node_id, first.accepted.node_id);
}

#[test]
fn a_retry_of_a_run_that_nobody_has_closes_it_everywhere_first() {
    let mut site = Site::start(&[("anthropic", 1)]);
    site.add_node(Options::default(), &[]);
    let client = site.shim.client();
    let outcome = client.run(tried(&new_id(), 2)).unwrap();
    assert_eq!(outcome.stdout(), "once");
    let claim = site.node().asked().claims.remove(0);
    let ballot = claim.ballot.unwrap();
    for node in &site.nodes {
        let fence = node.asked().fences.remove(0);
        let fence = fence.ballot.unwrap();
        assert!(fence.attempt < ballot.attempt && fence.nonce == ballot.nonce);
    }
}

#[test]
fn a_retry_with_a_node_out_of_reach_runs_only_if_its_caller_says_so() {
    let mut site = Site::start(&[("anthropic", 1)]);
    site.add_node(Options::default(), &[]);
    site.nodes[1].leave();
    site.wait_nodes(1, 1);
    let client = site.shim.client();
    let retry = tried(&new_id(), 2);
    may_have_run(client.run(retry.clone()), site.nodes[1].id());
    assert!(site.node().asked().claims.is_empty());
    let outcome = client.run(RunStart {
        accept_duplicate: true,
        ..retry
    });
    assert_eq!(outcome.unwrap().stdout(), "once");
}

#[test]
fn a_retry_that_a_node_cannot_tell_of_runs_only_if_its_caller_says_so() {
    let site = Site::start(&[("anthropic", 1)]);
    site.node().be_unsure();
    let client = site.shim.client();
    let retry = tried(&new_id(), 2);
    may_have_run(client.run(retry.clone()), site.node().id());
    let outcome = client.run(RunStart {
        accept_duplicate: true,
        ..retry
    });
    assert_eq!(outcome.unwrap().stdout(), "once");
}

#[test]
fn a_try_that_another_has_fenced_off_asks_every_node_again() {
    let site = Site::start(&[("anthropic", 1)]);
    let run_id = new_id();
    let (attempt, nonce) = (30, 7);
    let user_id = tried(&run_id, 1).user_id;
    let ballot = Ballot { attempt, nonce };
    site.node().fence(&run_id, &user_id, ballot);
    let outcome = site.shim.client().run(tried(&run_id, 1)).unwrap();
    assert_eq!(outcome.stdout(), "once");
    let asked = site.node().asked();
    assert!(!asked.fences.is_empty());
    let [refused, granted] = &asked.claims[..] else {
        panic!("{asked:?}");
    };
    let attempt_of = |claim: &Claim| claim.ballot.unwrap().attempt;
    assert!(attempt_of(refused) < 30 && attempt_of(granted) > 30);
}

/// Bob has found out the id of a run of alice's.
#[test]
fn another_users_run_with_the_same_id_does_not_stop_a_retry() {
    let mut site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    client.wait_idle("anthropic", 1);
    let (run_id, of) = (new_id(), |user: &str, run_id: &str, attempt| RunStart {
        user_id: user.into(),
        ..tried(run_id, attempt)
    });
    let bobs = client.run(of("bob", &run_id, 1)).unwrap();
    site.add_node(Options::default(), &[("anthropic", 1)]);
    client.wait_idle("anthropic", 2);
    // The first node says that the id is bob's there, and the retry goes to the other.
    let alices = client.run(of("alice", &run_id, 2)).unwrap();
    assert_eq!(alices.stdout(), "once");
    assert_ne!(alices.accepted.node_id, bobs.accepted.node_id);
    let again = client.run(of("alice", &run_id, 3)).unwrap();
    assert_eq!(again.accepted.slot_id, alices.accepted.slot_id);
    assert_eq!(again.accepted.generation, alices.accepted.generation);
    let bobs_again = client.run(of("bob", &run_id, 2)).unwrap();
    assert_eq!(bobs_again.accepted.slot_id, bobs.accepted.slot_id);
}

/// A fence binds the id to its user too: bob's claim does not come where alice's try has asked.
#[test]
fn an_id_is_bound_to_the_user_of_its_first_fence() {
    let mut site = Site::start(&[("anthropic", 1)]);
    let run_id = new_id();
    let ballot = Ballot {
        attempt: 5,
        nonce: 7,
    };
    site.node().fence(&run_id, "alice", ballot);
    let bobs = |attempt| RunStart {
        user_id: "bob".into(),
        ..tried(&run_id, attempt)
    };
    for attempt in [1, 9] {
        let refused = site.shim.client().run(bobs(attempt)).unwrap_err();
        assert_eq!(reason(&refused), "OTHER_USER", "{refused}");
    }
    // A node that cannot be asked may have bob's run.
    site.add_node(Options::default(), &[]);
    site.nodes[1].leave();
    site.wait_nodes(1, 1);
    may_have_run(site.shim.client().run(bobs(10)), site.nodes[1].id());
}

/// Options of a node that is newer than every run of these tests.
fn newer() -> Options {
    Options {
        since: Some(SystemTime::now() + Duration::from_secs(600)),
        ..Options::default()
    }
}

/// The older node learns where the run goes before the run goes there.
#[test]
fn a_claim_on_a_newer_node_is_announced_to_the_others() {
    let mut site = Site::start(&[]);
    site.add_node(newer(), &[("anthropic", 1)]);
    let client = site.shim.client();
    let outcome = client.run(tried(&new_id(), 1)).unwrap();
    assert_eq!(outcome.accepted.node_id, site.nodes[1].id());
    let told = site.node().asked().fences.remove(0);
    assert_eq!(told.claims_on, site.nodes[1].id());
    assert_eq!(told.run_id, outcome.accepted.run_id);
    // Attempt 0: the shim only asks.
    assert_eq!(told.ballot.unwrap().attempt, 0);
    assert!(site.nodes[1].asked().fences.is_empty());
}

#[test]
fn a_claim_on_an_older_node_is_announced_to_nobody() {
    let mut site = Site::start(&[("anthropic", 1)]);
    site.add_node(newer(), &[]);
    let outcome = site.shim.client().run(tried(&new_id(), 1)).unwrap();
    assert_eq!(outcome.accepted.node_id, site.node().id());
    assert!(site.nodes.iter().all(|node| node.asked().fences.is_empty()));
}

#[test]
fn a_newer_node_gets_no_run_of_which_none_of_the_others_can_tell() {
    let mut site = Site::start(&[]);
    site.node().be_unsure();
    site.add_node(newer(), &[("anthropic", 1)]);
    let client = site.shim.client();
    let start = at_once(tried(&new_id(), 1));
    let refused = client.run(start.clone()).unwrap_err();
    assert_eq!(reason(&refused), "NO_IDLE_SLOT");
    assert!(refused.message().contains(site.node().id()), "{refused}");
    assert!(site.nodes[1].asked().claims.is_empty());
    let outcome = client.run(RunStart {
        accept_duplicate: true,
        ..start
    });
    assert_eq!(outcome.unwrap().stdout(), "once");
}
