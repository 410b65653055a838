//! How a run ends: by itself, at its deadline, by its caller, by the kernel.

use std::time::{Duration, Instant};

use nix::{
    sys::signal::{Signal as UnixSignal, kill},
    unistd::Pid,
};
use polydev_proto::runtime::{ExitReason, RunStart, Signal, run_event::Event, run_input::Input};
use polydev_tests::{
    client::{argv, shell},
    docker,
    process::{Process, wait_for_log},
    shim::Shim,
    wait_until,
};

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

#[test]
fn a_caller_that_closes_its_side_closes_stdin() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let mut run = client
        .start(RunStart {
            stdin: true,
            ..argv("anthropic", &["cat"])
        })
        .unwrap();
    client.send(&run, Input::Stdin("all\n".into()));
    run.close();
    let outcome = client.finish(run).unwrap();
    assert_eq!(
        (outcome.stdout().as_str(), outcome.exited.exit_code),
        ("all\n", 0)
    );
}

#[test]
fn a_caller_that_stops_reading_cannot_keep_its_slot() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let start = RunStart {
        timeout: seconds(1),
        kill_timeout: seconds(1),
        ..shell("anthropic", "yes")
    };
    // The run is accepted, and its caller never reads.
    let run = client.start(start).unwrap();
    let next = client.run(shell("anthropic", "echo next")).unwrap();
    assert_eq!(next.stdout(), "next\n");
    drop(run);
}

#[test]
fn a_command_is_ended_at_its_deadline_first_kindly_then_not() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let kind = RunStart {
        timeout: seconds(1),
        ..shell(
            "anthropic",
            "trap 'echo bye; exit 5' TERM; while :; do sleep 0.1; done",
        )
    };
    let outcome = client.run(kind).unwrap();
    assert_eq!(
        outcome.exited.reason(),
        ExitReason::Deadline,
        "{}",
        outcome.exited.message
    );
    assert_eq!(
        (outcome.stdout().as_str(), outcome.exited.exit_code),
        ("bye\n", 124),
        "as with `timeout`, whatever the command says"
    );

    let plain = RunStart {
        timeout: seconds(1),
        ..argv("anthropic", &["sleep", "1000"])
    };
    let outcome = client.run(plain).unwrap();
    assert_eq!(outcome.exited.reason(), ExitReason::Deadline);
    assert_eq!(outcome.exited.exit_code, 124);
    assert_eq!(
        outcome.exited.signal, 15,
        "SIGTERM is enough for what does not resist"
    );

    let stubborn = RunStart {
        timeout: seconds(1),
        kill_timeout: seconds(1),
        ..shell("anthropic", "trap '' TERM; while :; do sleep 0.1; done")
    };
    let outcome = client.run(stubborn).unwrap();
    assert_eq!(outcome.exited.reason(), ExitReason::Deadline);
    assert_eq!((outcome.exited.signal, outcome.exited.exit_code), (9, 124));
}

/// Row 11 of the users' runs: Gemini CLI ends with 0 when it gets SIGTERM.
#[test]
fn a_run_that_polydev_ends_has_not_succeeded_whatever_the_command_says() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let cancelled = |script: &str| {
        let mut run = client.start(shell("anthropic", script)).unwrap();
        while !matches!(client.next(&mut run).unwrap(), Some(Event::Stdout(_))) {}
        client.cancel(&run.accepted.run_id).unwrap();
        loop {
            if let Some(Event::Exited(exited)) = client.next(&mut run).unwrap() {
                return (exited.reason(), exited.exit_code);
            }
        }
    };
    let well = "trap 'exit 0' TERM; echo; sleep 100 & wait";
    assert_eq!(cancelled(well), (ExitReason::Cancelled, 143));
    let not_at_all = "trap '' TERM; echo; while :; do sleep 0.1; done";
    assert_eq!(cancelled(not_at_all), (ExitReason::Cancelled, 137));

    let mut command = shim.run_command();
    command.args(["--timeout", "1", "anthropic", "--", "sh", "-c"]);
    let ended = command.arg("trap 'exit 0' TERM; sleep 100 & wait").output();
    assert_eq!(ended.unwrap().status.code(), Some(124));
}

#[test]
fn a_child_that_was_killed_for_want_of_memory_is_told() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let child = "node -e 'const a = []; for (;;) a.push(Buffer.alloc(8 << 20, 1))'";
    let outcome = client
        .run(shell("anthropic", &format!("{child}; echo goes on")))
        .unwrap();
    assert_eq!(outcome.stdout(), "goes on\n");
    let exited = outcome.exited;
    assert_eq!((exited.reason(), exited.exit_code), (ExitReason::Exited, 0));
    assert_eq!(exited.oom_kills, 1);
}

#[test]
fn a_deadline_is_kept_without_init() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let container = &docker::wait_containers(&shim.label(), 1)[0];
    let init = docker::inspect(container)["State"]["Pid"].as_i64();
    let init = Pid::from_raw(init.unwrap().try_into().unwrap());
    let start = RunStart {
        timeout: seconds(3),
        kill_timeout: seconds(1),
        ..shell("anthropic", "while :; do sleep 0.1; done")
    };
    let began = Instant::now();
    let run = client.start(start).unwrap();
    kill(init, UnixSignal::SIGSTOP).unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "before its deadline"
    );
    let outcome = client.finish(run).unwrap();
    assert_eq!(outcome.exited.reason(), ExitReason::Deadline);
    assert!(began.elapsed() < Duration::from_secs(15));
    client.wait_idle("anthropic", 1);
}

#[test]
fn what_a_command_leaves_behind_ends_with_it() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    // An orphan process keeps the pipe open. The run ends anyway, with its output.
    let outcome = client
        .run(shell(
            "anthropic",
            "setsid sleep 1000 & echo started; exit 0",
        ))
        .unwrap();
    assert_eq!(
        (outcome.stdout().as_str(), outcome.exited.exit_code),
        ("started\n", 0)
    );
}

#[test]
fn too_much_memory_is_told_as_such() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let script = "node -e 'const a = []; for (;;) a.push(Buffer.alloc(8 << 20, 1))'";
    let outcome = client
        .run(shell("anthropic", &format!("exec {script}")))
        .unwrap();
    assert_eq!(
        outcome.exited.reason(),
        ExitReason::OutOfMemory,
        "{}",
        outcome.stderr()
    );
    assert_eq!(outcome.exited.exit_code, 137);
    client.wait_idle("anthropic", 1);
}

#[test]
fn signals_of_the_caller_reach_the_command() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let script = "trap 'echo got INT; exit 7' INT; echo ready; while :; do sleep 0.1; done";
    let mut run = client.start(shell("anthropic", script)).unwrap();
    while !matches!(client.next(&mut run).unwrap(), Some(Event::Stdout(_))) {}
    client.send(&run, Input::Signal(Signal { number: 2 }));
    let mut text = String::new();
    loop {
        match client.next(&mut run).unwrap() {
            Some(Event::Stdout(output)) => text.push_str(&String::from_utf8_lossy(&output.data)),
            Some(Event::Exited(exited)) => {
                assert_eq!((text.as_str(), exited.exit_code), ("got INT\n", 7));
                return;
            }
            _ => {}
        }
    }
}

#[test]
fn what_cannot_be_started_has_the_status_that_docker_gives_it() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let check = |start: RunStart, code: i32, message: &str| {
        let outcome = client.run(start).unwrap();
        assert_eq!(outcome.exited.reason(), ExitReason::NotStarted);
        assert_eq!(outcome.exited.exit_code, code);
        assert!(
            outcome.exited.message.contains(message),
            "{}",
            outcome.exited.message
        );
    };
    check(
        argv("anthropic", &["no-such-program"]),
        127,
        "`no-such-program`",
    );
    check(argv("anthropic", &["/etc/passwd"]), 126, "`/etc/passwd`");
    let elsewhere = RunStart {
        work_dir: "/no/such".into(),
        ..argv("anthropic", &["true"])
    };
    check(elsewhere, 126, "`/no/such`");
}

#[test]
fn ctrl_c_at_the_command_line_reaches_the_command() {
    let shim = Shim::dev(&["anthropic=1"]);
    let folder = tempfile::tempdir().unwrap();
    let script = "trap 'echo interrupted; exit 4' INT; echo ready; while :; do sleep 0.1; done";
    let mut command = shim.run_command();
    command.args(["anthropic", "--", "sh", "-c", script]);
    let mut process = Process::start(&mut command, &folder.path().join("run.log"));
    wait_for_log(&process, "ready", Duration::from_secs(20));
    process.signal(UnixSignal::SIGINT);
    let status = wait_until("the end", Duration::from_secs(20), || {
        process.exit().ok_or("runs".into())
    });
    assert_eq!(status.code(), Some(4));
    assert!(process.log().contains("interrupted"));
}

#[test]
fn a_run_of_a_machine_that_was_restarted_is_lost_and_said_to_be() {
    let mut shim = Shim::dev(&["anthropic=1"]);
    let script = "echo begun; sleep 1000";
    let before = shim.client();
    let mut run = before.start(shell("anthropic", script)).unwrap();
    while !matches!(before.next(&mut run).unwrap(), Some(Event::Stdout(_))) {}
    let run_id = run.accepted.run_id.clone();
    shim.reboot();
    let client = shim.client();
    client.wait_idle("anthropic", 1);
    let run = client.attach(&run_id, [0; 2]).unwrap();
    let outcome = client.finish(run).unwrap();
    assert_eq!(outcome.exited.reason(), ExitReason::Lost);
    assert_eq!(outcome.exited.message, "the machine was restarted");
    docker::wait_containers(&shim.label(), 1);
}
