//! Wrong requests: the error names the wrong field, and no node receives the request.

use bytes::Bytes;
use polydev_proto::runtime::{
    AllocateRequest, Argv, Credential, GetPoolRequest, InputFile, ListRunsRequest, ReleaseRequest,
    RunStart, ScalePoolRequest, SubmitJobRequest, TerminalSize, WatchRunsRequest, input_file,
    run_start::Command,
};
use polydev_tests::client::Client;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::site::{Site, at_once, field, reason, seconds, steps};

#[track_caller]
fn is_invalid<T>(answer: Result<T, Status>, named: &str) {
    let status = answer.err().unwrap_or_else(|| panic!("`{named}` is taken"));
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert_eq!(reason(&status), "INVALID");
    assert_eq!(field(&status), named);
    let is_said = status.message().contains(&format!("`{named}`"));
    assert!(is_said, "{status} does not say `{named}`");
    assert!(status.get_error_details().retry_info().is_none());
}

fn with(change: impl FnOnce(&mut RunStart)) -> RunStart {
    let mut start = steps(&["true"]);
    change(&mut start);
    start
}

fn with_args(args: Vec<Bytes>) -> RunStart {
    with(|start| start.command = Some(Command::Argv(Argv { args, text: vec![] })))
}

fn with_env(name: &str) -> RunStart {
    with(|start| drop(start.env.insert(name.into(), "x".into())))
}

fn with_files(files: Vec<InputFile>) -> RunStart {
    with(|start| start.files = files)
}

fn file(path: &str, source: input_file::Source) -> InputFile {
    InputFile {
        path: path.into(),
        mode: 0,
        source: Some(source),
    }
}

/// Wrong runs, with the field that the error names.
fn wrong_commands() -> Vec<(RunStart, &'static str)> {
    let long = Bytes::from("x".repeat(131_072));
    vec![
        (with_args(vec![]), "argv"),
        (
            with_args(vec!["sh".into(), Bytes::from_static(b"a\0b")]),
            "argv[1]",
        ),
        (with_args(vec!["echo".into(), long.clone()]), "argv[1]"),
        (with_args(vec![long.slice(1..); 13]), "argv"),
        (with(|start| start.command = None), "command"),
        (with_env("A\0B"), r#"env["A\0B"]"#),
        (with_env("A=B"), r#"env["A=B"]"#),
        (with_env("LD_PRELOAD"), r#"env["LD_PRELOAD"]"#),
        (with_env("ANTHROPIC_API_KEY"), r#"env["ANTHROPIC_API_KEY"]"#),
        (with(|start| start.work_dir = "relative".into()), "work_dir"),
        (
            with_files(vec![file("../a", input_file::Source::Size(1))]),
            "files[0].path",
        ),
        (
            with_files(vec![
                file("a", input_file::Source::Size(1)),
                file("b", input_file::Source::Content("b".into())),
            ]),
            "files",
        ),
        (
            with(|start| {
                let (rows, columns) = (0, 80);
                start.terminal = Some(TerminalSize { rows, columns });
            }),
            "terminal.rows",
        ),
    ]
}

fn wrong_settings() -> Vec<(RunStart, &'static str)> {
    let other = || Uuid::now_v7().to_string();
    vec![
        (with(|start| start.provider = "mistral".into()), "provider"),
        (with(|start| start.user_id = String::new()), "user_id"),
        (with(|start| start.user_id = "a\nb".into()), "user_id"),
        (with(|start| start.user_id = "a".repeat(129)), "user_id"),
        (with(|start| start.run_id = "42".into()), "run_id"),
        (
            with(|start| start.run_id = Uuid::new_v4().to_string()),
            "run_id",
        ),
        (with(|start| start.lease_id = "42".into()), "lease_id"),
        (
            with(|start| {
                (start.run_id, start.lease_id) = (other(), other());
            }),
            "run_id",
        ),
        (with(|start| start.on_slow_reader = 7), "on_slow_reader"),
        (with(|start| start.timeout = seconds(0)), "timeout"),
        (with(|start| start.timeout = seconds(90_000)), "timeout"),
        (
            with(|start| start.kill_timeout = seconds(31)),
            "kill_timeout",
        ),
        (
            with(|start| start.queue_timeout = seconds(1801)),
            "queue_timeout",
        ),
        (
            with(|start| start.credential = Some(Credential::default())),
            "credential.source",
        ),
    ]
}

#[test]
fn a_wrong_field_of_a_run_is_named_and_takes_no_slot() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    for (start, named) in wrong_commands().into_iter().chain(wrong_settings()) {
        is_invalid(client.run(start), named);
    }
    let mistral = client.run(with(|start| start.provider = "mistral".into()));
    let words = mistral.unwrap_err().message().to_owned();
    assert!(words.contains("`provider` is `mistral`"), "{words}");
    assert!(site.node().asked().claims.is_empty());
    let after = client.run(steps(&["true"])).unwrap();
    assert_eq!(after.accepted.generation, 1);
}

#[test]
fn a_job_brings_all_that_it_reads() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let submit = |start: Option<RunStart>| {
        let request = SubmitJobRequest { start };
        client.call(async |mut shim| shim.submit_job(request).await)
    };
    is_invalid(submit(Some(with(|start| start.stdin = true))), "stdin");
    let follows = with_files(vec![file("a", input_file::Source::Size(5))]);
    is_invalid(submit(Some(follows)), "files");
    is_invalid(submit(None), "provider");
    assert!(site.node().asked().claims.is_empty());
}

fn is_wrong_list(client: &Client, change: impl FnOnce(&mut ListRunsRequest), named: &str) {
    let mut request = ListRunsRequest::default();
    change(&mut request);
    is_invalid(client.list_runs(request), named);
}

#[test]
fn a_wrong_field_of_a_question_about_runs_is_named() {
    let site = Site::start(&[]);
    let client = site.shim.client();
    is_wrong_list(&client, |list| list.user_id = "a\nb".into(), "user_id");
    is_wrong_list(&client, |list| list.provider = "codecs".into(), "provider");
    is_wrong_list(&client, |list| list.states = vec![9], "states");
    is_wrong_list(&client, |list| list.page_size = 1001, "page_size");
    is_wrong_list(
        &client,
        |list| list.page_token = "next".into(),
        "page_token",
    );
    let run_id = Uuid::now_v7().to_string();
    is_invalid(client.get_run_as("", &run_id), "user_id");
    is_invalid(client.get_run("42"), "run_id");
    is_invalid(client.get_run(&"x".repeat(100_000)), "run_id");
    is_invalid(client.cancel("42"), "run_id");
    is_invalid(client.attach("42", [0; 2]), "run_id");
    let request = WatchRunsRequest {
        provider: "codecs".into(),
        ..Default::default()
    };
    is_invalid(
        client.call(async |mut shim| shim.watch_runs(request).await),
        "provider",
    );
}

#[test]
fn a_wrong_field_of_a_lease_or_a_pool_is_named() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let allocate = |change: &dyn Fn(&mut AllocateRequest)| {
        let mut request = AllocateRequest {
            provider: "anthropic".into(),
            user_id: "tester".into(),
            time: seconds(60),
            queue_timeout: None,
        };
        change(&mut request);
        client.call(async |mut shim| shim.allocate(request).await)
    };
    is_invalid(allocate(&|lease| lease.time = seconds(0)), "time");
    is_invalid(allocate(&|lease| lease.time = seconds(1801)), "time");
    is_invalid(allocate(&|lease| lease.user_id.clear()), "user_id");
    is_invalid(allocate(&|lease| lease.provider = "x".into()), "provider");
    let too_long = allocate(&|lease| lease.queue_timeout = seconds(1801));
    is_invalid(too_long, "queue_timeout");
    let request = ReleaseRequest {
        lease_id: "42".into(),
        user_id: "tester".into(),
    };
    let released = client.call(async |mut shim| shim.release(request).await);
    is_invalid(released, "lease_id");
    let provider = "codecs".to_owned();
    let request = GetPoolRequest { provider };
    let pool = client.call(async |mut shim| shim.get_pool(request).await);
    is_invalid(pool, "provider");
    let request = ScalePoolRequest {
        provider: "codecs".into(),
        size: 1,
    };
    let scaled = client.call(async |mut shim| shim.scale_pool(request).await);
    is_invalid(scaled, "provider");
    assert!(site.node().asked().leases.is_empty());
}

#[test]
fn errors_have_details_for_programs() {
    let site = Site::start(&[]);
    let client = site.shim.client();
    let none_idle = client.run(at_once(steps(&["true"]))).unwrap_err();
    assert_eq!(none_idle.code(), Code::ResourceExhausted);
    assert_eq!(reason(&none_idle), "NO_IDLE_SLOT");
    let details = none_idle.get_error_details();
    let retry = details.retry_info().and_then(|retry| retry.retry_delay);
    assert!(retry.is_some_and(|delay| !delay.is_zero()));

    // An error may quote a value that is longer than the headers for errors may be.
    let user_id = "a\u{20ac}".repeat(100_000);
    is_invalid(client.run(with(|start| start.user_id = user_id)), "user_id");
    let wrong = client.run(with_env(&"LD_".repeat(100_000))).unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument);
    assert_eq!(reason(&wrong), "INVALID");

    // The shim accepts a provider's name in earlier systems.
    let start = at_once(with(|start| start.provider = "claude_code".into()));
    let none_idle = client.run(start).unwrap_err();
    assert_eq!(none_idle.code(), Code::ResourceExhausted);
    assert_eq!(reason(&none_idle), "NO_IDLE_SLOT");
}
