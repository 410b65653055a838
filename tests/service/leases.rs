//! Leases: the shim keeps a slot for a run before the run's command is known.

use polydev_proto::runtime::{AllocateRequest, Lease, ReleaseRequest, RunStart, SubmitJobRequest};
use polydev_tests::{
    client::{Client, argv},
    wait_until,
};
use tonic::{Code, Status};
use uuid::Uuid;

use crate::site::{LIMIT, Site, at_once, field, reason, seconds, steps};

fn allocate(client: &Client, time: i64) -> Result<Lease, Status> {
    let request = AllocateRequest {
        provider: "claude_code".into(),
        user_id: "tester".into(),
        time: seconds(time),
        queue_timeout: seconds(0),
    };
    let allocated = client.call(async |mut shim| shim.allocate(request).await)?;
    Ok(allocated.lease.expect("an answer has a lease"))
}

fn release(client: &Client, lease: &Lease, user_id: &str) -> Result<(), Status> {
    let request = ReleaseRequest {
        lease_id: lease.lease_id.clone(),
        user_id: user_id.into(),
    };
    let released = client.call(async |mut shim| shim.release(request).await);
    released.map(drop)
}

fn on(lease: &Lease, words: &[&str]) -> RunStart {
    RunStart {
        lease_id: lease.lease_id.clone(),
        ..steps(words)
    }
}

#[track_caller]
fn is_refused<T>(answer: Result<T, Status>, code: Code, expected: &str) {
    let status = answer.err().expect("a refusal");
    assert_eq!(status.code(), code, "{status}");
    assert_eq!(reason(&status), expected, "{status}");
}

#[test]
fn a_leased_slot_is_for_no_other_run() {
    let site = Site::start(&[("anthropic", 2)]);
    let client = site.shim.client();
    let lease = allocate(&client, 300).unwrap();
    let holds = RunStart {
        stdin: true,
        ..steps(&["cat"])
    };
    let other = client.start(holds).unwrap();
    assert_ne!(other.accepted.slot_id, lease.slot_id);
    let full = "NO_IDLE_SLOT";
    let third = client.run(at_once(steps(&["true"])));
    is_refused(third, Code::ResourceExhausted, full);
    is_refused(allocate(&client, 1), Code::ResourceExhausted, full);

    // Another user cannot use the lease, nor can a run for another provider.
    let stranger = RunStart {
        user_id: "mallory".into(),
        ..on(&lease, &["true"])
    };
    let ended = Code::FailedPrecondition;
    is_refused(client.run(stranger), ended, "LEASE_ENDED");
    let named = RunStart {
        run_id: Uuid::now_v7().to_string(),
        ..on(&lease, &["true"])
    };
    assert_eq!(field(&client.run(named).unwrap_err()), "run_id");
    let of_openai = RunStart {
        provider: "openai".into(),
        ..on(&lease, &["true"])
    };
    is_refused(client.run(of_openai), ended, "LEASE_ENDED");
}

#[test]
fn a_leases_run_has_its_slot_and_its_id_once() {
    let site = Site::start(&[("anthropic", 2)]);
    let client = site.shim.client();
    let lease = allocate(&client, 300).unwrap();
    let start = on(&lease, &["out:here\n", "exit:6"]);
    let outcome = client.run(start.clone()).unwrap();
    let accepted = &outcome.accepted;
    assert_eq!(accepted.run_id, lease.lease_id);
    assert_eq!(accepted.slot_id, lease.slot_id);
    assert_eq!(accepted.generation, lease.generation);
    assert_eq!(accepted.node_id, lease.node_id);
    assert_eq!(
        (&*outcome.stdout(), outcome.exited.exit_code),
        ("here\n", 6)
    );
    is_refused(
        client.run(start.clone()),
        Code::FailedPrecondition,
        "LEASE_ENDED",
    );
    let retry = RunStart {
        run_id: lease.lease_id.clone(),
        attempt: 2,
        ..start
    };
    assert_eq!(client.run(retry).unwrap().stdout(), "here\n");
    let used = release(&client, &lease, "tester");
    is_refused(used, Code::NotFound, "NO_LEASE");
}

#[test]
fn a_job_may_have_a_lease() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let lease = allocate(&client, 300).unwrap();
    let start = Some(on(&lease, &["out:job\n"]));
    let request = SubmitJobRequest { start };
    let submitted = client.call(async |mut shim| shim.submit_job(request).await);
    let accepted = submitted.unwrap().accepted.unwrap();
    assert_eq!(accepted.slot_id, lease.slot_id);
    let run = client.attach(&lease.lease_id, [0; 2]).unwrap();
    assert_eq!(client.finish(run).unwrap().stdout(), "job\n");
}

/// The slot is idle again with another container. The lease can no longer be used.
#[test]
fn a_lease_ends_with_its_time_or_when_its_user_gives_it_back() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let ends = |end: &dyn Fn(&Lease), time| {
        let lease = allocate(&client, time).unwrap();
        end(&lease);
        wait_until("another container", LIMIT, || {
            let next = allocate(&client, 300).map_err(|status| status.to_string())?;
            assert_ne!(next.generation, lease.generation);
            release(&client, &next, "tester").map_err(|status| status.to_string())
        });
        client.wait_idle("anthropic", 1);
        let late = client.run(on(&lease, &["true"]));
        is_refused(late, Code::FailedPrecondition, "LEASE_ENDED");
    };
    ends(&|_| {}, 1);
    ends(
        &|lease| {
            let others = release(&client, lease, "mallory");
            is_refused(others, Code::PermissionDenied, "OTHER_USER");
            release(&client, lease, "tester").unwrap();
        },
        300,
    );
    assert!(site.node().asked().claims.is_empty());
}

#[test]
fn the_run_of_a_lease_counts_as_its_users() {
    let site = Site::start_with(&[("anthropic", 2)], &["--user-running", "1"]);
    let client = site.shim.client();
    let lease = allocate(&client, 300).unwrap();
    let holds = RunStart {
        stdin: true,
        ..on(&lease, &["cat"])
    };
    let _run = client.start(holds).unwrap();
    let second = client.run(at_once(steps(&["true"])));
    is_refused(second, Code::ResourceExhausted, "USER_LIMIT");
    let others = RunStart {
        user_id: "bob".into(),
        ..argv("anthropic", &["true"])
    };
    client.run(others).unwrap();
}

#[test]
fn a_user_has_no_more_leases_than_are_allowed() {
    let site = Site::start_with(&[("anthropic", 3)], &["--user-leases", "2"]);
    let client = site.shim.client();
    let first = allocate(&client, 300).unwrap();
    allocate(&client, 300).unwrap();
    is_refused(
        allocate(&client, 300),
        Code::ResourceExhausted,
        "USER_LIMIT",
    );
    client.run(steps(&["true"])).unwrap();
    client.run(on(&first, &["true"])).unwrap();
    wait_until("a lease less", LIMIT, || {
        let lease = allocate(&client, 300);
        lease.map(drop).map_err(|status| status.to_string())
    });
}

/// No caller knows of the lease, which would keep its slot.
#[test]
fn a_lease_whose_answer_does_not_come_is_given_back() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    site.node().stall();
    is_refused(
        allocate(&client, 300),
        Code::ResourceExhausted,
        "NO_IDLE_SLOT",
    );
    let given_back = site.wait_asked(0, |asked| asked.releases.into_iter().next());
    assert_eq!(given_back.run_id, site.node().asked().leases[0].run_id);
    site.node().obey();
}

#[test]
fn a_lease_that_is_refused_is_had_elsewhere() {
    let mut site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    for code in [Code::FailedPrecondition, Code::ResourceExhausted] {
        site.node().refuse(code, "not here");
        let refused = allocate(&client, 300).unwrap_err();
        assert_eq!(reason(&refused), "NO_IDLE_SLOT");
        assert!(refused.message().contains("not here"), "{refused}");
    }
    assert!(site.node().asked().releases.is_empty());
    site.add_node(Default::default(), &[("anthropic", 1)]);
    let request = AllocateRequest {
        provider: "anthropic".into(),
        user_id: "tester".into(),
        time: seconds(300),
        queue_timeout: seconds(20),
    };
    let allocated = client.call(async |mut shim| shim.allocate(request).await);
    let lease = allocated.unwrap().lease.unwrap();
    assert_eq!(lease.node_id, site.nodes[1].id());
}

#[test]
fn a_lease_on_a_node_that_is_away_is_not_said_to_be_gone() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let lease = allocate(&client, 300).unwrap();
    site.node().leave();
    site.wait_nodes(0, 1);
    let unasked = release(&client, &lease, "tester");
    is_refused(unasked, Code::Unavailable, "NODE_UNREACHABLE");
    let run = client.run(on(&lease, &["true"]));
    is_refused(run, Code::Unavailable, "NODE_UNREACHABLE");
    site.node().obey();
    site.wait_nodes(1, 0);
    assert_eq!(
        client.run(on(&lease, &["out:here"])).unwrap().stdout(),
        "here"
    );
}
