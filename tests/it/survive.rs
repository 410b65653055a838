//! Runs outlive their caller's connection, the shim and the driver, and lose no byte.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use nix::{sys::signal::Signal, unistd::Pid};
use polydev_proto::runtime::{
    ExitReason, RunStart, RunState, SlowReader, run_event::Event, run_input::Input,
};
use polydev_tests::{
    client::{Client, Run, argv, shell},
    docker,
    nomad::Nomad,
    process::output,
    program,
    shim::Shim,
    wait_until,
};
use sha2::{Digest, Sha256};
use tonic::Code;
use uuid::Uuid;

use crate::{files, idle};

/// Numbered lines, so that every part of the stream is different.
fn lines(count: u32) -> String {
    (1..=count).map(|line| format!("{line}\n")).collect()
}

/// Reads at least `least` bytes of stdout.
fn read(client: &Client, run: &mut Run, least: usize) -> Vec<u8> {
    let mut read = Vec::new();
    while read.len() < least {
        match client.next(run).expect("the run goes on") {
            Some(Event::Stdout(output)) => {
                assert_eq!(output.offset, read.len() as u64);
                read.extend_from_slice(&output.data);
            }
            Some(Event::Started(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    read
}

#[test]
fn a_caller_whose_connection_broke_finds_every_byte() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let script = "seq 1 200000; read line; seq 200001 400000; echo $line";
    let start = RunStart {
        stdin: true,
        ..shell("anthropic", script)
    };
    let mut run = client.start(start).unwrap();
    let run_id = run.accepted.run_id.clone();
    let mut text = read(&client, &mut run, 700_000);
    drop(run);

    // More output than was read had been on its way.
    let run = client.attach(&run_id, [text.len(), 0]).unwrap();
    assert_eq!(
        run.accepted.stdin_offset, 0,
        "the command reads nothing yet"
    );
    client.send(&run, Input::Stdin("the end\n".into()));
    let outcome = client.finish_from(run, [text.len(), 0]).unwrap();
    text.extend_from_slice(&outcome.stdout);
    assert!(text == (lines(400_000) + "the end\n").into_bytes());
    assert_eq!(outcome.exited.reason(), ExitReason::Exited);

    // Once more, after the run's end.
    let run = client.attach(&run_id, [text.len() - 8, 0]).unwrap();
    let again = client.finish_from(run, [text.len() - 8, 0]).unwrap();
    assert_eq!(again.stdout(), "the end\n");
    assert_eq!(again.exited.reason(), ExitReason::Exited);
}

/// How many bytes of the command's output the driver has.
fn written(client: &Client, run_id: &str) -> usize {
    let run = client.get_run(run_id).expect("the run is known");
    usize::try_from(run.stdout_bytes).expect("it fits into memory")
}

#[test]
fn what_was_on_its_way_to_a_caller_that_went_away_is_kept() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let expected = lines(3_000_000).into_bytes();
    let mut run = client.start(shell("anthropic", "seq 1 3000000")).unwrap();
    let run_id = run.accepted.run_id.clone();
    let mut text = read(&client, &mut run, 1 << 20);
    // The caller no longer reads: all buffers on the way fill up, and the command waits.
    let (mut before, mut stood) = (0, 0);
    let full = wait_until("the command to wait", Duration::from_secs(60), || {
        let now = written(&client, &run_id);
        stood = if now == before { stood + 1 } else { 0 };
        before = now;
        if now > 4 << 20 && stood > 5 {
            Ok(now)
        } else {
            Err(now.to_string())
        }
    });
    assert!(full < 14 << 20, "{full} bytes are held");
    drop(run);
    let run = client.attach(&run_id, [text.len(), 0]).unwrap();
    let outcome = client.finish_from(run, [text.len(), 0]).unwrap();
    text.extend_from_slice(&outcome.stdout);
    assert!(text == expected);
}

#[test]
fn a_run_without_a_caller_goes_on_until_it_is_cancelled() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let script = "trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let mut run = client.start(shell("anthropic", script)).unwrap();
    let run_id = run.accepted.run_id.clone();
    read(&client, &mut run, 6);
    drop(run);
    let [container] = &docker::containers(&shim.label())[..] else {
        panic!("one container")
    };
    let run = client.attach(&run_id, [6, 0]).unwrap();
    client.cancel(&run_id).unwrap();
    let outcome = client.finish_from(run, [6, 0]).unwrap();
    assert_eq!(outcome.exited.reason(), ExitReason::Cancelled);
    assert_eq!(
        (outcome.stdout().as_str(), outcome.exited.exit_code),
        ("told\n", 143)
    );
    client.wait_idle("anthropic", 1);
    let left = docker::wait_containers(&shim.label(), 1);
    assert!(!left.contains(container));
    client.cancel(&run_id).expect("an ended run is cancelled");
}

#[test]
fn what_cannot_be_attached_to_is_told_why() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let run = client.start(shell("anthropic", "echo some")).unwrap();
    let run_id = run.accepted.run_id.clone();
    client.finish(run).unwrap();
    let refused = |user: &str, run_id: &str, offset| {
        let refused = client.attach_as(user, run_id, [offset, 0]).err().unwrap();
        (refused.code(), refused.message().to_owned())
    };
    let (code, words) = refused("tester", &run_id, 6);
    assert_eq!(code, Code::OutOfRange);
    assert_eq!(
        words,
        "`stdout_offset` is 6, but the command has written only 5 bytes"
    );
    assert_eq!(refused("mallory", &run_id, 0).0, Code::PermissionDenied);
    // For a driver, an empty user is the operator. A shim's caller is never the operator.
    let ended = |user| client.cancel_as(user, &run_id).unwrap_err().code();
    assert_eq!(ended("mallory"), Code::PermissionDenied);
    assert_eq!(ended(""), Code::InvalidArgument);
    assert_eq!(refused("", &run_id, 0).0, Code::InvalidArgument);
    let unknown = Uuid::now_v7().to_string();
    let (code, words) = refused("tester", &unknown, 0);
    assert_eq!(code, Code::NotFound);
    assert_eq!(words, format!("this node has no run `{unknown}`"));
    assert_eq!(client.cancel(&unknown).unwrap_err().code(), Code::NotFound);
}

#[test]
fn a_command_that_must_not_wait_loses_its_oldest_output_and_says_how_much() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let start = RunStart {
        on_slow_reader: SlowReader::DropOldest.into(),
        ..shell("anthropic", "seq 1 4000000; echo written >&2; sleep 1000")
    };
    let run = client.start(start).unwrap();
    let run_id = run.accepted.run_id.clone();
    // Nobody reads, and the command still ends.
    let expected = lines(4_000_000).into_bytes();
    wait_until("the command's last line", Duration::from_secs(60), || {
        let written = written(&client, &run_id);
        if written == expected.len() {
            Ok(())
        } else {
            Err(written.to_string())
        }
    });
    drop(run);
    let mut run = client.attach(&run_id, [0, 0]).unwrap();
    let Some(Event::Started(_)) = client.next(&mut run).unwrap() else {
        panic!("the run has started")
    };
    let mut at = 0;
    while at < expected.len() {
        match client.next(&mut run).unwrap() {
            Some(Event::Lost(lost)) => {
                assert_eq!(
                    (lost.stream(), lost.from),
                    (polydev_proto::runtime::Stream::Stdout, 0)
                );
                at = usize::try_from(lost.to).unwrap();
                assert!(at > expected.len() / 2, "only {at} bytes are lost");
            }
            Some(Event::Stdout(output)) => {
                let end = at + output.data.len();
                assert!(output.data == expected[at..end], "at {at}");
                at = end;
            }
            Some(Event::Stderr(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    client.cancel(&run_id).unwrap();
}

#[test]
fn a_journal_of_a_newer_driver_is_left_as_it_is_and_said_to_be() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("s");
    fs::create_dir(&state).unwrap();
    let json = br#"{"record":"format","version":2}"#;
    let sum = hex::encode(&Sha256::digest(json)[..4]);
    let newer = [sum.as_bytes(), b" ", json, b"\n"].concat();
    fs::write(state.join("runs.journal"), &newer).unwrap();
    let mut command = Command::new(program("polydev-shim"));
    let socket = format!("unix://{}", folder.path().join("shim.sock").display());
    command.args(["dev", "--pool", "anthropic=1", "--listen", &socket]);
    command.arg("--state-dir").arg(&state);
    let refused = output(&mut command);
    assert!(!refused.status.success());
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        words.contains("has version 2, this driver reads 1"),
        "{words}"
    );
    assert_eq!(fs::read(state.join("runs.journal")).unwrap(), newer);
}

/// The driver that has the node of a state folder.
pub(crate) fn driver(state_dir: &Path) -> Pid {
    holder(state_dir).expect("a driver has the node")
}

/// `None` also while a driver writes its name.
fn holder(state_dir: &Path) -> Option<Pid> {
    let holder = fs::read_to_string(state_dir.join("driver.lock")).ok()?;
    holder.trim().parse().ok().map(Pid::from_raw)
}

pub(crate) fn kill_driver(nomad: &Nomad) {
    let killed = driver(&nomad.state_dir());
    nix::sys::signal::kill(killed, Signal::SIGKILL).expect("a live process");
    wait_until("another driver", Duration::from_secs(60), || {
        match holder(&nomad.state_dir()) {
            Some(next) if next != killed => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

#[test]
fn a_killed_driver_loses_no_run_no_byte_and_no_result() {
    let nomad = Nomad::start();
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    nomad.submit_pool("anthropic", 5);
    let before = nomad.wait_running("polydev-pool-anthropic", 5);
    client.wait_idle("anthropic", 5);

    let result = RunStart {
        run_id: Uuid::now_v7().to_string(),
        ..shell("anthropic", "echo out; echo err >&2; exit 3")
    };
    let first = client.run(result.clone()).unwrap();
    client.wait_idle("anthropic", 5);

    // One run prints all the time, one waits for input, one ends while no driver runs;
    let script = "for part in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do \
        seq 1 20000; sleep 0.5; done";
    let mut printing = client.start(shell("anthropic", script)).unwrap();
    let echo = RunStart {
        stdin: true,
        ..argv("anthropic", &["cat"])
    };
    let echo = client.start(echo).unwrap();
    client.send(&echo, Input::Stdin("before ".into()));
    let ends = shell("anthropic", "echo begin; sleep 2; echo end; exit 7");
    let ends = client.start(ends).unwrap();
    // one waits for the rest of its files, and one's caller is fetching artifacts.
    let gets = files::gets(&client);
    let leaves = files::leaves(&client);
    let mut text = read(&client, &mut printing, 100_000);

    // The next driver is another version, with another init.
    nomad.upgrade();
    kill_driver(&nomad);
    client.send(&echo, Input::Stdin("and after".into()));
    let outcome = client.finish_from(printing, [text.len(), 0]).unwrap();
    text.extend_from_slice(&outcome.stdout);
    assert!(text == lines(20_000).repeat(20).into_bytes());
    assert_eq!(outcome.exited.reason(), ExitReason::Exited);

    gets.finish(&client);
    leaves.finish(&client);

    // The driver that took over the run describes it as the previous driver did.
    let waits = client.get_run(&echo.accepted.run_id).unwrap();
    assert_eq!(waits.state(), RunState::Running);
    assert_eq!(waits.provider, "anthropic");
    assert_eq!((waits.started_at.is_some(), waits.cancelled), (true, false));

    // The caller closes its side now. The second driver does not have the first driver's input.
    let mut echo = echo;
    echo.close();
    let outcome = client.finish(echo).unwrap();
    assert_eq!(outcome.stdout(), "before and after");
    let outcome = client.finish(ends).unwrap();
    assert_eq!(
        (outcome.stdout().as_str(), outcome.exited.exit_code),
        ("begin\nend\n", 7)
    );

    // A run that ended earlier keeps its result, also through another shim. A retry gets it too.
    let other = Shim::serve(&nomad.address);
    let other_client = other.client();
    other_client.wait_idle("anthropic", 5);
    let attached = other_client.attach(&result.run_id, [0; 2]).unwrap();
    let attached = other_client.finish(attached).unwrap();
    let again = other_client.run(result).unwrap();
    for outcome in [attached, again] {
        assert_eq!(outcome.stdout, first.stdout);
        assert_eq!(outcome.stderr, first.stderr);
        assert_eq!(outcome.exited.exit_code, 3);
        assert_eq!(outcome.accepted.generation, first.accepted.generation);
    }

    // Nomad saw nothing of the change of drivers, and the slots are warm again.
    client.wait_idle("anthropic", 5);
    let state = fs::read_dir(nomad.state_dir()).unwrap().flatten();
    let inits = state.filter(|file| file.file_name().to_string_lossy().starts_with("init-"));
    assert_eq!(inits.count(), 2, "the new init beside that of the runs");
    let ids = |list: &[serde_json::Value]| -> Vec<String> {
        list.iter().map(|alloc| alloc["ID"].to_string()).collect()
    };
    let after = nomad.wait_running("polydev-pool-anthropic", 5);
    assert_eq!(ids(&after), ids(&before));

    idle::are_taken_up_if_they_would_be_made_so(&nomad, &client);
}

/// The agent's clean stop ends the plugin. Runs continue without it.
#[test]
fn an_agent_that_is_stopped_or_killed_and_started_loses_no_run_and_no_byte() {
    let mut nomad = Nomad::start_lasting();
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    nomad.submit_pool("anthropic", 1);
    nomad.wait_running("polydev-pool-anthropic", 1);
    client.wait_idle("anthropic", 1);

    // All of Nomad, server and agent, is paused. Warm claims still work, and so do refills.
    nomad.agent().signal(Signal::SIGSTOP);
    for _ in 0..2 {
        let outcome = client.run(shell("anthropic", "echo on")).unwrap();
        assert_eq!(outcome.stdout(), "on\n");
        client.wait_idle("anthropic", 1);
    }
    nomad.agent().signal(Signal::SIGCONT);

    let script = "seq 1 20000; sleep 6; seq 20001 40000; sleep 20; echo done";
    let mut run = client.start(shell("anthropic", script)).unwrap();
    let mut text = read(&client, &mut run, 100_000);
    let began = Instant::now();
    nomad.restart();
    // A killed agent leaves its driver running, and the next agent finds it.
    let kept = driver(&nomad.state_dir());
    nomad.agent().end(Signal::SIGKILL);
    // A restarted server knows no nodes before its election. The shim knows them, and describes the
    // run all the time.
    std::thread::scope(|scope| {
        let restarted = scope.spawn(|| nomad.restart());
        while !restarted.is_finished() {
            let going = client.get_run(&run.accepted.run_id).unwrap();
            assert_eq!(going.state(), RunState::Running);
        }
        restarted.join().unwrap();
    });
    assert_eq!(driver(&nomad.state_dir()), kept);
    let outcome = client.finish_from(run, [text.len(), 0]).unwrap();
    assert!(began.elapsed() < Duration::from_secs(60));
    text.extend_from_slice(&outcome.stdout);
    assert!(text == (lines(40_000) + "done\n").into_bytes());
    assert_eq!(outcome.exited.reason(), ExitReason::Exited);
    client.wait_idle("anthropic", 1);
}
