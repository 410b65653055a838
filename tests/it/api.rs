//! What any gRPC client may request of a shim beside runs.

use std::time::Duration;

use polydev_proto::runtime::{
    CloseStdin, ExitReason, ListRunsRequest, Run, RunStart, RunState, SubmitJobRequest,
    run_event::Event, run_input::Input,
};
use polydev_tests::{
    client::{Client, argv, shell},
    process::{Process, succeed},
    shim::Shim,
    wait_until,
};
use serde_json::Value;
use tonic::Code;
use tonic_types::StatusExt;

#[test]
fn runs_are_listed_page_by_page_and_shown() {
    let shim = Shim::dev(&["anthropic=2"]);
    let client = shim.client();
    assert!(ids(&client, ListRunsRequest::default()).is_empty());

    let mut expected = Vec::new();
    for script in ["printf some", "exit 3", "printf more >&2"] {
        let outcome = client.run(shell("anthropic", script)).unwrap();
        expected.insert(0, outcome.accepted.run_id);
    }
    let other = RunStart {
        user_id: "other".into(),
        stdin: true,
        ..shell("anthropic", "read line")
    };
    let mut going = client.start(other).unwrap();
    while !matches!(client.next(&mut going).unwrap(), Some(Event::Started(_))) {}
    expected.insert(0, going.accepted.run_id.clone());

    // With every page size, each run comes once, the newest first.
    for page_size in [1, 2, 3, 4, 0] {
        let request = ListRunsRequest {
            page_size,
            ..Default::default()
        };
        assert_eq!(ids(&client, request), expected);
    }
    let of = |user_id: &str, states: &[RunState]| ListRunsRequest {
        user_id: user_id.into(),
        states: states.iter().map(|state| (*state).into()).collect(),
        page_size: 1,
        ..Default::default()
    };
    assert_eq!(ids(&client, of("tester", &[])), expected[1..]);
    assert_eq!(ids(&client, of("", &[RunState::Running])), expected[..1]);
    assert_eq!(ids(&client, of("", &[RunState::Ended])), expected[1..]);
    assert!(ids(&client, of("tester", &[RunState::Running])).is_empty());
    let google = ListRunsRequest {
        provider: "google".into(),
        ..Default::default()
    };
    assert!(ids(&client, google).is_empty());

    let failed = client.get_run(&expected[2]).unwrap();
    assert_eq!(failed.state(), RunState::Ended);
    let exited = failed.exited.as_ref().unwrap();
    assert_eq!((exited.reason(), exited.exit_code), (ExitReason::Exited, 3));
    let [claimed, started, ended] =
        [failed.claimed_at, failed.started_at, failed.ended_at].map(|at| {
            let at = at.expect("an ended run");
            (at.seconds, at.nanos)
        });
    assert!(claimed <= started && started <= ended);
    assert_eq!(failed.provider, "anthropic");
    let written = client.get_run(&expected[1]).unwrap();
    assert_eq!((written.stdout_bytes, written.stderr_bytes), (0, 4));
    let running = client.get_run_as("other", &expected[0]).unwrap();
    assert!(running.state() == RunState::Running && running.exited.is_none());
    assert!(!running.cancelled && running.ended_at.is_none());

    let printed = |arguments: &[&str]| {
        let output = shim.command(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let lines = printed(&["runs", "list", "--output", "json", "--limit", "3"]);
    let listed: Vec<String> = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["run_id"].to_string())
        .collect();
    let quoted: Vec<String> = expected[..3].iter().map(|id| format!("\"{id}\"")).collect();
    assert_eq!(listed, quoted);
    let table = printed(&["runs", "list", "--state", "running"]);
    assert_eq!(table.lines().count(), 2, "{table}");
    let shown = printed(&["runs", "show", "--user", "tester", &expected[2]]);
    assert!(shown.contains("exit code   3\n"), "{shown}");
    assert!(printed(&["runs", "cancel", "--user", "other", &expected[0]]).is_empty());
    while client.next(&mut going).unwrap().is_some() {}
    let cancelled = client.get_run_as("other", &expected[0]).unwrap();
    assert!(cancelled.cancelled && cancelled.state() == RunState::Ended);
}

#[test]
fn runs_are_watched_as_they_come_further() {
    let shim = Shim::dev(&["anthropic=2"]);
    let client = shim.client();
    client.run(shell("anthropic", "exit 2")).unwrap();
    let waits = RunStart {
        stdin: true,
        ..shell("anthropic", "read line")
    };
    let going = client.start(waits.clone()).unwrap();

    let mut command = shim.command(&["runs", "watch", "--user", "tester", "--output", "json"]);
    let watch = Process::start(&mut command, &shim.state_dir().join("watch.log"));
    let told = |run_id: &str, state: &str| {
        wait_until(
            &format!("{run_id} {state}"),
            Duration::from_secs(20),
            || {
                let log = watch.log();
                let told = log.lines().map(|line| serde_json::from_str(line).unwrap());
                let is_it = |run: &Value| run["run_id"] == run_id && run["state"] == state;
                told.into_iter().find(is_it).ok_or(log)
            },
        )
    };
    // Running runs come first. Runs that ended earlier are not reported.
    told(&going.accepted.run_id, "running");
    let lines = watch.log();
    let of_it = |line: &str| line.contains(&going.accepted.run_id);
    assert!(lines.lines().all(of_it), "{lines}");
    client.send(&going, Input::CloseStdin(CloseStdin {}));
    let run_id = going.accepted.run_id.clone();
    client.finish(going).unwrap();
    assert_eq!(told(&run_id, "ended")["exited"]["exit_code"], 1);

    let others = RunStart {
        user_id: "other".into(),
        ..shell("anthropic", "true")
    };
    let others = client.run(others).unwrap().accepted.run_id;
    let next = client.start(waits).unwrap();
    told(&next.accepted.run_id, "running");
    client.cancel(&next.accepted.run_id).unwrap();
    assert_eq!(told(&next.accepted.run_id, "ended")["cancelled"], true);
    assert!(!watch.log().contains(&others), "{}", watch.log());
}

#[test]
fn a_job_that_is_submitted_runs_without_a_caller() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let submit = |start: RunStart| {
        let request = SubmitJobRequest { start: Some(start) };
        client.call(async |mut shim| shim.submit_job(request).await)
    };
    let run_id = uuid::Uuid::now_v7().to_string();
    let job = RunStart {
        run_id: run_id.clone(),
        attempt: 1,
        ..shell("anthropic", "seq 1 100000; exit 3")
    };
    let accepted = submit(job.clone()).unwrap().accepted.unwrap();
    assert_eq!(accepted.run_id, run_id);
    // Any number of requests make only one run.
    let again = RunStart { attempt: 2, ..job };
    assert_eq!(submit(again).unwrap().accepted.unwrap(), accepted);
    let exited = wait_until("its end", Duration::from_secs(20), || {
        let run = client.get_run(&run_id);
        let run = run.map_err(|status| status.to_string())?;
        run.exited.ok_or_else(|| "still running".to_owned())
    });
    assert_eq!(exited.exit_code, 3);
    let run = client.attach(&run_id, [0; 2]).unwrap();
    let outcome = client.finish(run).unwrap();
    let lines: String = (1..=100_000).map(|line| format!("{line}\n")).collect();
    assert!(outcome.stdout() == lines);

    client.wait_idle("anthropic", 1);
    let detached = [
        "run",
        "anthropic",
        "--detach",
        "--",
        "sh",
        "-c",
        "cat; echo over",
    ];
    let printed = succeed(&mut shim.command(&detached));
    let attached = ["runs", "attach", printed.trim()];
    assert_eq!(succeed(&mut shim.command(&attached)), "over\n");

    let stdin = RunStart {
        stdin: true,
        ..shell("anthropic", "cat")
    };
    assert_eq!(submit(stdin).unwrap_err().code(), Code::InvalidArgument);
    let none = client.call(async |mut shim| shim.submit_job(SubmitJobRequest::default()).await);
    assert_eq!(none.unwrap_err().code(), Code::InvalidArgument);
}

#[test]
fn what_cannot_be_listed_is_told_why() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let refused = |request: ListRunsRequest, field: &str| {
        let status = client.list_runs(request).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let words = format!("`{field}`");
        assert!(status.message().starts_with(&words), "{status}");
        let details = status.get_error_details();
        let violations = &details.bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, field);
    };
    let request = ListRunsRequest::default;
    let (user_id, provider) = ("a\nb".into(), "codecs".into());
    refused(
        ListRunsRequest {
            user_id,
            ..request()
        },
        "user_id",
    );
    refused(
        ListRunsRequest {
            provider,
            ..request()
        },
        "provider",
    );
    let states = vec![9];
    refused(
        ListRunsRequest {
            states,
            ..request()
        },
        "states",
    );
    let page_size = 1001;
    refused(
        ListRunsRequest {
            page_size,
            ..request()
        },
        "page_size",
    );
    let page_token = "next".into();
    refused(
        ListRunsRequest {
            page_token,
            ..request()
        },
        "page_token",
    );

    let outcome = client.run(shell("anthropic", "true")).unwrap();
    let code = |user: &str, run_id: &str| client.get_run_as(user, run_id).unwrap_err().code();
    assert_eq!(
        code("mallory", &outcome.accepted.run_id),
        Code::PermissionDenied
    );
    assert_eq!(code("", &outcome.accepted.run_id), Code::InvalidArgument);
    let unknown = uuid::Uuid::now_v7().to_string();
    assert_eq!(code("tester", &unknown), Code::NotFound);
    assert_eq!(code("tester", "42"), Code::InvalidArgument);
    assert_eq!(code("tester", &"x".repeat(100_000)), Code::InvalidArgument);
    let upper = outcome.accepted.run_id.to_uppercase();
    assert_eq!(
        client.get_run(&upper).unwrap().run_id,
        outcome.accepted.run_id
    );

    // The list contains all names of missing programs, even long ones.
    let long = format!("/{}", "long/".repeat(25_000));
    for _ in 0..3 {
        client.wait_idle("anthropic", 1);
        let refused = client.run(argv("anthropic", &[&long])).unwrap();
        assert_eq!(refused.exited.reason(), ExitReason::NotStarted);
        assert!(refused.exited.message.len() <= 1000);
    }
    assert_eq!(ids(&client, request()).len(), 4);
}

/// The ids of all runs that fit, by as many pages as it takes.
fn ids(client: &Client, mut request: ListRunsRequest) -> Vec<String> {
    let mut ids = Vec::new();
    loop {
        let page = client.list_runs(request.clone()).expect("runs are listed");
        assert!(page.nodes_unreachable.is_empty());
        ids.extend(page.runs.into_iter().map(|Run { run_id, .. }| run_id));
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            return ids;
        }
    }
}
