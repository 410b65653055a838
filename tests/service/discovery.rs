//! How the shim finds its nodes through Nomad, and what it does if Nomad does not know them.

use polydev_proto::{
    node::slot::State,
    runtime::{ExitReason, ListRunsRequest, RunStart},
};
use polydev_tests::{fake_node::Options, fake_nomad::Mood, wait_until};
use serde_json::{Value, json};
use tonic::Code;
use uuid::Uuid;

use crate::site::{LIMIT, Site, at_once, reason, steps};

/// Waits until the shim has requested the nodes `times` more times: then it has acted on Nomad's
/// present answer.
fn wait_heard(site: &Site, times: usize) {
    let before = site.nomad().lists();
    wait_until("another question to Nomad", LIMIT, || {
        let lists = site.nomad().lists() - before;
        (lists >= times).then_some(()).ok_or(lists.to_string())
    });
}

#[test]
fn without_a_node_nothing_runs() {
    let site = Site::empty(&[]);
    let client = site.shim.client();
    let retry = RunStart {
        run_id: Uuid::now_v7().to_string(),
        attempt: 2,
        ..steps(&["true"])
    };
    let listed = client.list_runs(ListRunsRequest::default()).map(drop);
    for answer in [
        client.run(at_once(steps(&["true"]))).map(drop),
        client.run(retry).map(drop),
        client.get_run(&Uuid::now_v7().to_string()).map(drop),
        listed,
    ] {
        let status = answer.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        assert_eq!(reason(&status), "NO_NODE");
    }
}

#[test]
fn a_node_is_followed_once_it_is_ready_and_says_where() {
    let mut site = Site::start(&[("anthropic", 1)]);
    let described = site.node().description();
    let unready = |change: &dyn Fn(&mut Value)| {
        let mut node = described.clone();
        node["ID"] = json!(Uuid::new_v4().to_string());
        change(&mut node);
        node
    };
    site.nomad().set_nodes([
        unready(&|node| node["Status"] = json!("down")),
        unready(&|node| node["Drivers"]["polydev"]["Attributes"] = Value::Null),
        unready(&|node| node["Drivers"] = json!({ "docker": {} })),
    ]);
    site.add_node(Options::default(), &[("anthropic", 1)]);
    site.shim.client().wait_idle("anthropic", 2);
    site.wait_nodes(2, 0);
}

/// Nodes that were set up alike have the same path: on the shim's machine it leads to that machine's
/// driver, whichever node is meant.
#[test]
fn a_path_that_leads_to_another_nodes_driver_is_not_that_node() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let mut other = site.node().description();
    let other_id = Uuid::new_v4().to_string();
    other["ID"] = json!(other_id);
    other["Drivers"]["polydev"]["Attributes"]["driver.polydev.node_identity"] =
        json!(Uuid::new_v4().to_string());
    site.nomad().set_nodes([other]);
    site.wait_nodes(1, 1);
    assert_eq!(client.pool("anthropic").idle, 1, "it is counted once");
    let retry = RunStart {
        run_id: Uuid::now_v7().to_string(),
        attempt: 2,
        ..steps(&["true"])
    };
    let status = client.run(retry).unwrap_err();
    assert_eq!(reason(&status), "MAY_HAVE_RUN", "{status}");
    // The other node's drain ends no run of this one.
    let run = client.start(steps(&["wait"])).unwrap();
    site.node()
        .change_slots(|slot| slot.set_state(State::Draining));
    site.nomad().change_node(&other_id, |node| {
        node["SchedulingEligibility"] = json!("ineligible");
        node["LastDrain"] = json!({ "Status": "complete" });
    });
    wait_heard(&site, 2);
    assert!(site.node().asked().cancels.is_empty());
    client.cancel(&run.accepted.run_id).unwrap();
    client.finish(run).unwrap();
}

/// The node's runs continue. The node gets no new runs, and may come back.
#[test]
fn a_node_that_nomad_has_lost_keeps_its_runs_and_gets_no_new_ones() {
    let mut site = Site::start(&[]);
    site.add_node(Options::default(), &[("anthropic", 2)]);
    let client = site.shim.client();
    let run = client.start(steps(&["wait"])).unwrap();
    let lost = site.nodes[1].description();
    site.nomad().remove_node(site.nodes[1].id());
    wait_heard(&site, 1);
    let refused = client.run(at_once(steps(&["true"]))).unwrap_err();
    assert_eq!(reason(&refused), "NO_IDLE_SLOT");
    client.cancel(&run.accepted.run_id).unwrap();
    client.finish(run).unwrap();
    // The node no longer belongs to the cluster.
    site.nodes[1].break_connections();
    site.wait_nodes(1, 0);
    site.nomad().set_nodes([lost]);
    site.wait_nodes(2, 0);
    client.wait_idle("anthropic", 2);
    client.run(at_once(steps(&["true"]))).unwrap();
}

/// A server that has just started knows no nodes: the shim keeps those that it knows.
#[test]
fn a_server_without_a_leader_takes_no_node_away() {
    let mut site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    site.nomad().set_mood(Mood::Leaderless);
    wait_heard(&site, 2);
    client.run(steps(&["true"])).unwrap();
    // The shim would not follow a removed node again.
    site.node().leave();
    site.wait_nodes(0, 1);
    site.node().obey();
    site.wait_nodes(1, 0);
    site.nomad().set_mood(Mood::Well);
    site.add_node(Options::default(), &[]);
}

#[test]
fn a_nomad_that_fails_or_is_silent_takes_no_node_away() {
    let mut site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    for mood in [Mood::Failing, Mood::Stalled] {
        site.nomad().set_mood(mood);
        if mood == Mood::Failing {
            wait_heard(&site, 2);
        }
        client.run(steps(&["true"])).unwrap();
        site.node().break_connections();
        client.wait_idle("anthropic", 1);
        site.wait_nodes(1, 0);
        client.run(steps(&["true"])).unwrap();
        client.wait_idle("anthropic", 1);
    }
    site.nomad().set_mood(Mood::Well);
    site.add_node(Options::default(), &[]);
}

/// A driver cannot see that the drain of its node has reached the deadline.
#[test]
fn runs_that_are_left_on_a_drained_node_are_ended_by_the_shim() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let run = client.start(steps(&["wait"])).unwrap();
    site.node()
        .change_slots(|slot| slot.set_state(State::Draining));
    wait_until("a slot that drains", LIMIT, || {
        let pool = client.pool("anthropic");
        (pool.draining == 1)
            .then_some(())
            .ok_or(format!("{pool:?}"))
    });
    assert!(
        site.node().asked().cancels.is_empty(),
        "its pool was stopped"
    );
    let node_id = site.node().id();
    site.nomad().change_node(node_id, |node| {
        node["SchedulingEligibility"] = json!("ineligible");
        node["LastDrain"] = json!({ "Status": "complete" });
    });
    let outcome = client.finish(run).unwrap();
    assert_eq!(outcome.exited.reason(), ExitReason::Cancelled);
    let cancel = site.node().asked().cancels.remove(0);
    assert!(cancel.user_id.is_empty() && !cancel.reason.is_empty());
    assert!(outcome.exited.message.contains(&cancel.reason));
}
