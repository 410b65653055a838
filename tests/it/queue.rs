//! Runs that wait for a slot.

use std::time::Duration;

use polydev_proto::runtime::{ListRunsRequest, Queued, RunStart, run_event::Event};
use polydev_tests::{
    client::{Client, Events, shell},
    shim::Shim,
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

fn run_of(user_id: &str, script: &str) -> RunStart {
    RunStart {
        user_id: user_id.into(),
        stdin: true,
        queue_timeout: Some(prost_types::Duration {
            seconds: 60,
            nanos: 0,
        }),
        ..shell("anthropic", script)
    }
}

fn before(client: &Client, events: &mut Events) -> u32 {
    match client.next_of(events).expect("it waits") {
        Some(Event::Queued(Queued { before })) => before,
        other => panic!("{other:?}"),
    }
}

/// Reads a run that has waited to its end.
fn served(client: &Client, events: &mut Events) {
    let mut is_accepted = false;
    loop {
        match client.next_of(events).expect("it is served") {
            Some(Event::Accepted(_)) => is_accepted = true,
            Some(Event::Exited(exited)) => {
                assert!(is_accepted && exited.exit_code == 0);
                return;
            }
            Some(_) => {}
            None => panic!("no end"),
        }
    }
}

#[test]
fn users_take_turns_and_see_their_place() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let mut holder = client.start(run_of("alice", "cat")).unwrap();
    let (_alice_input, mut alice) = client.submit(run_of("alice", "true")).unwrap();
    assert_eq!(before(&client, &mut alice), 0);
    // Alice has a run, Bob has none.
    let (_bob_input, mut bob) = client.submit(run_of("bob", "true")).unwrap();
    assert_eq!(before(&client, &mut bob), 0);
    assert_eq!(before(&client, &mut alice), 1);

    holder.close();
    served(&client, &mut bob);
    served(&client, &mut alice);
    client.finish(holder).unwrap();
}

#[test]
fn who_waits_too_long_or_with_too_many_is_refused_with_the_figures() {
    let shim = Shim::dev_with(
        &["anthropic=2"],
        &["--user-running", "1", "--user-queued", "1"],
    );
    let client = shim.client();
    let holder = client.start(run_of("alice", "cat")).unwrap();
    // A slot is idle, and it is not for her.
    let waits = RunStart {
        queue_timeout: Some(prost_types::Duration {
            seconds: 1,
            nanos: 0,
        }),
        ..run_of("alice", "true")
    };
    let (_input, mut waiting) = client.submit(waits).unwrap();
    assert_eq!(before(&client, &mut waiting), 0);
    let refused = client.start(run_of("alice", "true")).err().unwrap();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let words = "user `alice` has 1 runs waiting already, this shim lets no more";
    assert_eq!(refused.message(), words);
    let bob = std::time::Instant::now();
    let (_bob_input, mut events) = client.submit(run_of("bob", "true")).unwrap();
    served(&client, &mut events);
    assert!(
        bob.elapsed() < Duration::from_secs(20),
        "nobody held him up"
    );

    // Its place changed while Bob came and was served.
    let refused = loop {
        match client.next_of(&mut waiting) {
            Ok(Some(Event::Queued(_))) => {}
            other => break other.unwrap_err(),
        }
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let words = "user `alice` has as many runs going as this shim lets, still after 1 s";
    assert_eq!(refused.message(), words);
    let details = refused.get_error_details();
    let violations = &details.quota_failure().unwrap().violations;
    assert_eq!(violations[0].subject, "user:alice");
    drop(holder);
}

#[test]
fn callers_and_users_have_rates() {
    let options = ["--caller-rate", "20", "--user-rate", "2"];
    let shim = Shim::dev_with(&["anthropic=1"], &options);
    let client = shim.client();
    // Runs that are refused for another reason count as well.
    let start = |user: &str| {
        let start = RunStart {
            user_id: user.into(),
            queue_timeout: Some(prost_types::Duration::default()),
            ..shell("openai", "true")
        };
        client.run(start).unwrap_err()
    };
    let is_limit = |status: &Status, subject: &str| {
        let details = status.get_error_details();
        let reason = &details.error_info().unwrap().reason;
        if reason != "RATE_LIMIT" {
            return false;
        }
        assert_eq!(status.code(), Code::ResourceExhausted);
        let violations = &details.quota_failure().unwrap().violations;
        assert_eq!(violations[0].subject, subject);
        assert!(details.retry_info().unwrap().retry_delay.is_some());
        true
    };
    let refused: Vec<_> = (0..4).map(|_| start("greedy")).collect();
    let limited = refused
        .iter()
        .filter(|status| is_limit(status, "user:greedy"))
        .count();
    assert!((1..=2).contains(&limited), "{refused:?}");
    assert!(!is_limit(&start("modest"), "user:modest"));

    let mut listed = (0..200).map(|_| client.list_runs(ListRunsRequest::default()));
    let refused = listed.find_map(Result::err).expect("so many are refused");
    assert!(is_limit(&refused, "caller:uid:0"));
}
