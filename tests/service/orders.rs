//! Slots on demand: the shim orders them from Nomad, each for one run.

use std::thread;

use polydev_proto::{
    broker::Egress,
    node::slot::State,
    runtime::{RunStart, run_event::Event},
};
use polydev_tests::{fake_nomad::Dispatched, wait_until};

use crate::site::{LIMIT, Site, reason, seconds, steps};

/// Waits for the first order.
fn ordered(site: &Site) -> Dispatched {
    wait_until("an order", LIMIT, || {
        let dispatched = site.nomad().dispatched();
        dispatched.into_iter().next().ok_or("none".to_owned())
    })
}

fn waits(time: i64) -> RunStart {
    RunStart {
        queue_timeout: seconds(time),
        ..steps(&["out:here"])
    }
}

#[test]
fn a_run_that_finds_no_idle_slot_gets_one_of_its_own() {
    let site = Site::start(&[]);
    site.nomad().add_on_demand("anthropic");
    thread::scope(|scope| {
        let run = scope.spawn(|| site.shim.client().run(waits(20)));
        let order = ordered(&site);
        assert!(order.idempotency_token.contains(&order.run_id));
        site.node().add_slot_for("anthropic", &order.run_id);
        let outcome = run.join().unwrap().unwrap();
        assert_eq!(outcome.stdout(), "here");
        assert_eq!(outcome.accepted.run_id, order.run_id);
        assert!(!outcome.accepted.warm && !outcome.exited.warm);
        let stages = outcome.exited.timeline.iter();
        let stages: Vec<_> = stages.map(|stage| &*stage.name).collect();
        assert_eq!(stages[..3], ["received", "dispatched", "claimed"]);
    });
    assert_eq!(site.nomad().dispatched().len(), 1);
    assert!(site.nomad().stopped().is_empty());
}

#[test]
fn an_order_that_is_not_needed_is_withdrawn() {
    let site = Site::start(&[]);
    site.nomad().add_on_demand("anthropic");
    thread::scope(|scope| {
        let run = scope.spawn(|| site.shim.client().run(waits(20)));
        let order = ordered(&site);
        site.node().add_slots("anthropic", 1);
        let outcome = run.join().unwrap().unwrap();
        assert!(outcome.accepted.warm);
        wait_until("the order's end", LIMIT, || {
            let stopped = site.nomad().stopped();
            (stopped == [order.job.clone()])
                .then_some(())
                .ok_or(format!("{stopped:?}"))
        });
    });
}

/// The shim also withdraws the order of a run whose caller no longer waits.
#[test]
fn an_order_of_a_run_that_is_given_up_is_withdrawn() {
    let site = Site::start(&[]);
    site.nomad().add_on_demand("anthropic");
    let client = site.shim.client();
    let refused = client.run(waits(2)).unwrap_err();
    assert_eq!(reason(&refused), "NO_IDLE_SLOT");
    let order = ordered(&site);
    assert!(refused.message().contains(&order.job), "{refused}");
    wait_until("the order's end", LIMIT, || {
        let stopped = site.nomad().stopped();
        (stopped == [order.job.clone()])
            .then_some(())
            .ok_or(format!("{stopped:?}"))
    });
}

#[test]
fn without_the_job_the_caller_is_told() {
    let site = Site::start(&[]);
    let refused = site.shim.client().run(waits(2)).unwrap_err();
    assert_eq!(reason(&refused), "NO_IDLE_SLOT");
    let job = "`polydev-on-demand-anthropic`";
    assert!(refused.message().contains(job), "{refused}");
    assert!(site.nomad().dispatched().is_empty());
}

/// The shim makes the second order when the first run has its slot.
#[test]
fn so_many_orders_wait_at_a_time_as_are_allowed() {
    let site = Site::start_with(&[], &["--on-demand", "1"]);
    site.nomad().add_on_demand("anthropic");
    let client = site.shim.client();
    let (_first, mut one) = client.submit(waits(20)).unwrap();
    let (_second, mut two) = client.submit(waits(20)).unwrap();
    let mut served = Vec::new();
    for count in 1..=2 {
        let order = wait_until("an order", LIMIT, || {
            let dispatched = site.nomad().dispatched();
            assert!(dispatched.len() <= count, "{dispatched:?}");
            dispatched
                .into_iter()
                .nth(count - 1)
                .ok_or("none".to_owned())
        });
        site.node().add_slot_for("anthropic", &order.run_id);
        served.push(order.run_id);
    }
    let mut ran = Vec::new();
    for events in [&mut one, &mut two] {
        while let Some(event) = client.next_of(events).unwrap() {
            if let Event::Accepted(accepted) = event {
                ran.push(accepted.run_id);
            }
        }
    }
    ran.sort();
    served.sort();
    assert_eq!(ran, served);
}

#[test]
fn a_shim_that_may_order_none_orders_none() {
    let site = Site::start_with(&[], &["--on-demand", "0"]);
    site.nomad().add_on_demand("anthropic");
    let refused = site.shim.client().run(waits(2)).unwrap_err();
    assert_eq!(reason(&refused), "NO_IDLE_SLOT");
    assert!(site.nomad().dispatched().is_empty());
}

/// The default of its job is the internet.
#[test]
fn a_slot_on_demand_that_reaches_more_than_its_pool_gets_no_run() {
    let site = Site::start(&[("anthropic", 1)]);
    let list = |rules: &[&str]| {
        let allow = rules.iter().map(ToString::to_string).collect();
        Some(Egress { allow })
    };
    site.nomad().add_on_demand("anthropic");
    site.node().change_slots(|slot| {
        slot.egress = list(&["a.example", "b.example"]);
        slot.set_state(State::Claimed);
    });
    let run = |egress: Option<Egress>| {
        thread::scope(|scope| {
            let before = site.nomad().dispatched().len();
            let run = scope.spawn(|| site.shim.client().run(waits(2)));
            let order = wait_until("an order", LIMIT, || {
                let dispatched = site.nomad().dispatched();
                dispatched.into_iter().nth(before).ok_or("none".to_owned())
            });
            site.node()
                .add_slot_for_with("anthropic", &order.run_id, egress.clone());
            run.join().unwrap()
        })
    };
    for more in [None, list(&["a.example", "c.example"])] {
        let refused = run(more).map(drop).unwrap_err();
        assert!(
            refused.message().contains("may reach more than the pool"),
            "{refused}"
        );
    }
    assert_eq!(run(list(&["a.example"])).unwrap().stdout(), "here");
}
