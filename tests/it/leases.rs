//! Leases: a slot is kept for a run before the run's command is known.

use std::time::Duration;

use polydev_proto::runtime::{AllocateRequest, Lease, ReleaseRequest, RunStart, SubmitJobRequest};
use polydev_tests::{
    client::{Client, shell},
    process::succeed,
    shim::Shim,
    wait_until,
};
use tonic::{Code, Status};

pub(crate) fn allocate(client: &Client, seconds: i64) -> Result<Lease, Status> {
    let request = AllocateRequest {
        provider: "claude_code".into(),
        user_id: "tester".into(),
        time: Some(prost_types::Duration { seconds, nanos: 0 }),
        queue_timeout: Some(prost_types::Duration::default()),
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

fn on(lease: &Lease, script: &str) -> RunStart {
    RunStart {
        lease_id: lease.lease_id.clone(),
        ..shell("anthropic", script)
    }
}

#[test]
fn a_leased_slot_is_for_its_run_alone() {
    let shim = Shim::dev(&["anthropic=2"]);
    let client = shim.client();
    client.wait_idle("anthropic", 2);
    let lease = allocate(&client, 300).unwrap();
    let listed = succeed(&mut shim.command(&["pool", "show", "anthropic"]));
    assert!(listed.contains("leased"), "{listed}");

    // Another run gets the other slot. A third run gets none.
    let other = client
        .start(RunStart {
            stdin: true,
            ..shell("anthropic", "cat")
        })
        .unwrap();
    assert_ne!(other.accepted.slot_id, lease.slot_id);
    let none = RunStart {
        queue_timeout: Some(prost_types::Duration::default()),
        ..shell("anthropic", "true")
    };
    let refused = client.start(none).map(drop).unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("0 are idle"), "{refused}");
    assert_eq!(
        allocate(&client, 1).unwrap_err().code(),
        Code::ResourceExhausted
    );

    // Another user cannot use the lease.
    let stranger = RunStart {
        user_id: "mallory".into(),
        ..on(&lease, "true")
    };
    let refused = client.start(stranger).map(drop).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert_eq!(
        release(&client, &lease, "mallory").unwrap_err().code(),
        Code::PermissionDenied
    );
    let named = RunStart {
        run_id: uuid::Uuid::now_v7().to_string(),
        ..on(&lease, "true")
    };
    let refused = client.start(named).map(drop).unwrap_err();
    assert!(refused.message().starts_with("`run_id` "), "{refused}");

    let other_provider = RunStart {
        provider: "openai".into(),
        ..on(&lease, "true")
    };
    let refused = client.start(other_provider).map(drop).unwrap_err();
    assert!(
        refused.message().contains("its slot is for `anthropic`"),
        "{refused}"
    );

    let run = client.start(on(&lease, "echo here; exit 6")).unwrap();
    assert_eq!(
        (
            &run.accepted.run_id,
            &run.accepted.slot_id,
            run.accepted.generation
        ),
        (&lease.lease_id, &lease.slot_id, lease.generation)
    );
    let outcome = client.finish(run).unwrap();
    assert_eq!(
        (outcome.stdout().as_str(), outcome.exited.exit_code),
        ("here\n", 6)
    );

    // The lease is used up: the same run is attached to, and another run is refused.
    let again = client
        .start(on(&lease, "echo here; exit 6"))
        .map(drop)
        .unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition, "{again}");
    let retry = RunStart {
        run_id: lease.lease_id.clone(),
        attempt: 2,
        ..on(&lease, "echo here; exit 6")
    };
    assert_eq!(client.run(retry).unwrap().stdout(), "here\n");
    assert_eq!(
        release(&client, &lease, "tester").unwrap_err().code(),
        Code::NotFound
    );
    drop(other);
}

#[test]
fn a_lease_that_ends_or_is_given_back_leaves_another_container() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let ends = |end: &dyn Fn(&Lease), seconds| {
        client.wait_idle("anthropic", 1);
        let lease = allocate(&client, seconds).unwrap();
        end(&lease);
        let renewed = || {
            let next = allocate(&client, 1).map_err(|status| status.to_string())?;
            if next.generation == lease.generation {
                return Err("it is still there".to_owned());
            }
            Ok(())
        };
        wait_until("another container", Duration::from_secs(20), renewed);
        let late = client.start(on(&lease, "true")).map(drop).unwrap_err();
        assert_eq!(late.code(), Code::FailedPrecondition, "{late}");
        assert!(late.message().contains(&lease.lease_id), "{late}");
    };
    ends(&|_| {}, 1);
    ends(&|lease| release(&client, lease, "tester").unwrap(), 300);

    // A job may use a lease too.
    client.wait_idle("anthropic", 1);
    let lease = allocate(&client, 300).unwrap();
    let start = Some(on(&lease, "echo job"));
    let request = SubmitJobRequest { start };
    client
        .call(async |mut shim| shim.submit_job(request).await)
        .unwrap();
    let run = client.attach(&lease.lease_id, [0; 2]).unwrap();
    assert_eq!(client.finish(run).unwrap().stdout(), "job\n");

    for (seconds, user_id, field) in [
        (0, "tester", "`time`"),
        (1801, "tester", "`time`"),
        (1, "", "`user_id`"),
    ] {
        let request = AllocateRequest {
            provider: "anthropic".into(),
            user_id: user_id.into(),
            time: Some(prost_types::Duration { seconds, nanos: 0 }),
            queue_timeout: None,
        };
        let refused = client
            .call(async |mut shim| shim.allocate(request).await)
            .unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().starts_with(field), "{refused}");
    }
}
