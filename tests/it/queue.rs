//! Limits of a shim without Nomad. How runs wait for a slot, and what limits mean, is shown in
//! `tests/service/queue.rs`.

use polydev_proto::runtime::{ListRunsRequest, RunStart, run_event::Event};
use polydev_tests::{client::shell, shim::Shim};
use tonic::Status;
use tonic_types::StatusExt;

/// The reason of a refusal, and whose limit it is.
fn refusal(status: &Status) -> (String, String) {
    let details = status.get_error_details();
    let reason = details.error_info().expect("every error has it");
    let quota = details.quota_failure();
    let subject = quota.map(|quota| quota.violations[0].subject.clone());
    (reason.reason.clone(), subject.unwrap_or_default())
}

fn limit(reason: &str, subject: &str) -> (String, String) {
    (reason.to_owned(), subject.to_owned())
}

#[test]
fn a_shim_without_nomad_has_the_limits_that_it_is_given() {
    let runs = ["--user-running", "1", "--user-queued", "1"];
    let rates = ["--user-rate", "5", "--caller-rate", "50"];
    let shim = Shim::dev_with(&["anthropic=2"], &[runs, rates].concat());
    let client = shim.client();
    let run_of = |seconds| RunStart {
        stdin: true,
        queue_timeout: Some(prost_types::Duration { seconds, nanos: 0 }),
        ..shell("anthropic", "cat")
    };
    let mut holder = client.start(run_of(60)).unwrap();
    // A slot is idle, and it is not for this user.
    let (_input, mut waiting) = client.submit(run_of(2)).unwrap();
    let queued = client.next_of(&mut waiting);
    assert!(matches!(queued, Ok(Some(Event::Queued(_)))), "{queued:?}");
    let second = client.run(run_of(2)).unwrap_err();
    assert_eq!(refusal(&second), limit("QUEUE_FULL", "user:tester"));
    let first = loop {
        match client.next_of(&mut waiting) {
            Ok(Some(Event::Queued(_))) => {}
            other => break other.unwrap_err(),
        }
    };
    assert_eq!(refusal(&first), limit("USER_LIMIT", "user:tester"));
    holder.close();
    client.finish(holder).unwrap();

    // Runs that are refused for another reason count as well.
    let greedy = RunStart {
        provider: "openai".into(),
        user_id: "greedy".into(),
        ..run_of(0)
    };
    let mut refused = (0..100).map(|_| client.run(greedy.clone()).unwrap_err());
    let of_user = limit("RATE_LIMIT", "user:greedy");
    assert!(refused.any(|status| refusal(&status) == of_user));
    let mut listed = (0..200).map(|_| client.list_runs(ListRunsRequest::default()));
    let refused = listed.find_map(Result::err).expect("so many are refused");
    assert_eq!(refusal(&refused), limit("RATE_LIMIT", "caller:uid:0"));
}
