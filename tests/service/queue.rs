//! Runs that wait for a slot: their order among users, their number, and how long they wait.

use std::time::{Duration, Instant};

use polydev_proto::runtime::{
    ListRunsRequest, Queued, RunStart, SubmitJobRequest, run_event::Event,
};
use polydev_tests::{
    client::{Client, Events, argv},
    wait_until,
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::site::{LIMIT, Site, at_once, myself, reason, seconds, steps};

fn run_of(user_id: &str, word: &str) -> RunStart {
    RunStart {
        user_id: user_id.into(),
        stdin: true,
        queue_timeout: seconds(60),
        ..steps(&[word])
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
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
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
    // The next turn after Alice's first run depends on the first event at the shim: the end of the
    // run, or the idle slot.
    let claims = site.node().asked().claims;
    assert_eq!(claims.len(), 3);
}

#[test]
fn a_run_that_is_given_up_leaves_its_place() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let mut holder = client.start(run_of("alice", "cat")).unwrap();
    let (bob_input, mut bob) = client.submit(run_of("bob", "true")).unwrap();
    assert_eq!(before(&client, &mut bob), 0);
    let (_carol_input, mut carol) = client.submit(run_of("carol", "true")).unwrap();
    assert_eq!(before(&client, &mut carol), 1);
    drop((bob, bob_input));
    assert_eq!(before(&client, &mut carol), 0);
    holder.close();
    served(&client, &mut carol);
    assert_eq!(site.node().asked().claims.len(), 2);
}

#[test]
fn each_provider_has_a_queue_of_its_own() {
    let site = Site::start(&[("anthropic", 1), ("openai", 1)]);
    let client = site.shim.client();
    let _holder = client.start(run_of("alice", "cat")).unwrap();
    let (_input, mut waiting) = client.submit(run_of("bob", "true")).unwrap();
    assert_eq!(before(&client, &mut waiting), 0);
    let other = client.run(argv("openai", &["true"])).unwrap();
    assert_eq!(other.exited.exit_code, 0);
}

#[test]
fn who_finds_none_idle_is_told_after_the_time_given() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let _holder = client.start(run_of("alice", "cat")).unwrap();
    let begun = Instant::now();
    let waits = RunStart {
        queue_timeout: seconds(1),
        ..run_of("bob", "true")
    };
    let refused = client.run(waits).unwrap_err();
    assert!(begun.elapsed() >= Duration::from_secs(1));
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(reason(&refused), "NO_IDLE_SLOT");
    assert!(refused.message().contains("claimed"), "{refused}");
    let at_once = client.run(at_once(steps(&["true"]))).unwrap_err();
    assert_eq!(reason(&at_once), "NO_IDLE_SLOT");

    // Nor is one idle where there is none.
    let waits = RunStart {
        queue_timeout: seconds(1),
        ..argv("google", &["true"])
    };
    let refused = client.run(waits).unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let words = "the provider has no slots";
    assert!(refused.message().contains(words), "{refused}");
}

#[track_caller]
fn is_quota(status: &Status, expected: &str, subject: &str) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert_eq!(reason(status), expected, "{status}");
    let details = status.get_error_details();
    let violations = &details.quota_failure().expect("it is a quota").violations;
    assert_eq!(violations[0].subject, subject);
    let retry = details.retry_info().and_then(|retry| retry.retry_delay);
    assert!(retry.is_some_and(|delay| !delay.is_zero()), "{status}");
}

#[test]
fn a_user_has_no_more_runs_going_or_waiting_than_are_allowed() {
    let limits = ["--user-running", "1", "--user-queued", "1"];
    let site = Site::start_with(&[("anthropic", 2)], &limits);
    let client = site.shim.client();
    let _holder = client.start(run_of("alice", "cat")).unwrap();
    // A slot is idle, but Alice may not have it.
    let waits = RunStart {
        queue_timeout: seconds(1),
        ..run_of("alice", "true")
    };
    let (_input, mut waiting) = client.submit(waits).unwrap();
    assert_eq!(before(&client, &mut waiting), 0);
    let refused = client.start(run_of("alice", "true")).err().unwrap();
    is_quota(&refused, "QUEUE_FULL", "user:alice");
    let words = "user `alice` has 1 runs waiting already; this shim allows no more";
    assert_eq!(refused.message(), words);
    let bob = Instant::now();
    let (_bob_input, mut events) = client.submit(run_of("bob", "true")).unwrap();
    served(&client, &mut events);
    assert!(bob.elapsed() < LIMIT, "nobody held Bob up");

    // The run's place changed while Bob came and was served.
    let refused = loop {
        match client.next_of(&mut waiting) {
            Ok(Some(Event::Queued(_))) => {}
            other => break other.unwrap_err(),
        }
    };
    is_quota(&refused, "USER_LIMIT", "user:alice");
    let words =
        "user `alice` still had as many active runs or leases as this shim allows after 1 s";
    assert_eq!(refused.message(), words);
    assert_eq!(site.node().asked().claims.len(), 2);
}

#[test]
fn a_users_next_run_begins_when_one_has_ended() {
    let site = Site::start_with(&[("anthropic", 2)], &["--user-running", "1"]);
    let client = site.shim.client();
    let mut holder = client.start(run_of("alice", "cat")).unwrap();
    let (_input, mut waiting) = client.submit(run_of("alice", "true")).unwrap();
    assert_eq!(before(&client, &mut waiting), 0);
    holder.close();
    client.finish(holder).unwrap();
    served(&client, &mut waiting);
}

/// Whoever started them, and whether anybody still listens.
#[test]
fn all_runs_of_a_user_count_on_whatever_way_they_came() {
    let limit = ["--user-running", "1"];
    let site = Site::start_with(&[("anthropic", 3)], &limit);
    let client = site.shim.client();
    let is_held = |way: &str| {
        let second = client.run(at_once(run_of("alice", "true"))).unwrap_err();
        assert_eq!(reason(&second), "USER_LIMIT", "{way}: {second}");
        client.run(run_of("bob", "true")).unwrap();
    };
    let waits = || RunStart {
        stdin: false,
        ..run_of("alice", "wait")
    };

    let start = Some(waits());
    let submit = SubmitJobRequest { start };
    let job = client.call(async |mut shim| shim.submit_job(submit).await);
    let job = job.unwrap().accepted.unwrap().run_id;
    is_held("a job");
    client.cancel_as("alice", &job).unwrap();
    client.wait_idle("anthropic", 3);

    let run = client.start(waits()).unwrap();
    let run_id = run.accepted.run_id.clone();
    drop(run);
    is_held("a run whose caller has gone");
    client.cancel_as("alice", &run_id).unwrap();
    client.wait_idle("anthropic", 3);

    let other = site.another_shim(&limit);
    let run = other.client().start(waits()).unwrap();
    wait_until("what the other shim has done", LIMIT, || {
        let pool = client.pool("anthropic");
        (pool.claimed == 1).then_some(()).ok_or(format!("{pool:?}"))
    });
    is_held("another shim's run");
    let waiting = RunStart {
        queue_timeout: seconds(20),
        ..run_of("alice", "true")
    };
    let (_input, mut events) = client.submit(waiting).unwrap();
    assert_eq!(before(&client, &mut events), 0);
    other
        .client()
        .cancel_as("alice", &run.accepted.run_id)
        .unwrap();
    served(&client, &mut events);
}

#[test]
fn callers_and_users_have_rates() {
    let options = ["--caller-rate", "20", "--user-rate", "2"];
    let site = Site::start_with(&[("anthropic", 1)], &options);
    let client = site.shim.client();
    let is_limited = |status: &Status| reason(status) == "RATE_LIMIT";
    // Runs that are refused for another reason also count.
    let start = |user: &str| {
        let start = RunStart {
            user_id: user.into(),
            ..at_once(argv("openai", &["true"]))
        };
        client.run(start).unwrap_err()
    };
    let refused: Vec<_> = (0..4).map(|_| start("greedy")).collect();
    let limited: Vec<_> = refused.iter().filter(|status| is_limited(status)).collect();
    assert!((1..=2).contains(&limited.len()), "{refused:?}");
    for status in limited {
        is_quota(status, "RATE_LIMIT", "user:greedy");
    }
    assert!(!is_limited(&start("modest")));

    let mut listed = (0..200).map(|_| client.list_runs(ListRunsRequest::default()));
    let refused = listed.find_map(Result::err).expect("so many are refused");
    is_quota(&refused, "RATE_LIMIT", &format!("caller:{}", myself()));
}
