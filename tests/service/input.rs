//! The input that a caller sends to its run.

use bytes::Bytes;
use polydev_proto::runtime::{
    CloseStdin, InputFile, RunStart, Signal, TerminalSize, input_file::Source, run_input::Input,
};
use polydev_tests::client::{Client, Run};
use tonic::{Code, Status};

use crate::site::{Site, field, reason, steps};

fn reads(words: &[&str]) -> RunStart {
    RunStart {
        stdin: true,
        ..steps(words)
    }
}

/// A run that waits for three bytes of a file.
fn waits_for_a_file() -> RunStart {
    let file = InputFile {
        path: "in".into(),
        mode: 0,
        source: Some(Source::Size(3)),
    };
    RunStart {
        files: vec![file],
        ..reads(&["files", "cat"])
    }
}

/// The error that a run's stream ends with.
fn error_of(client: &Client, run: &mut Run) -> Status {
    loop {
        match client.next(run) {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without an error"),
            Err(status) => return status,
        }
    }
}

#[track_caller]
fn is_invalid(client: &Client, mut run: Run, input: Input, named: &str) {
    client.send(&run, input);
    let status = error_of(client, &mut run);
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert_eq!(
        (reason(&status), field(&status)),
        ("INVALID".into(), named.into())
    );
}

#[test]
fn files_come_first_and_then_stdin_and_signals() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let run = client.start(waits_for_a_file()).unwrap();
    let run_id = run.accepted.run_id.clone();
    for input in [
        Input::Files("ab".into()),
        Input::Files("c".into()),
        Input::Stdin("def".into()),
        Input::Signal(Signal { number: 10 }),
        Input::CloseStdin(CloseStdin {}),
    ] {
        client.send(&run, input);
    }
    let outcome = client.finish(run).unwrap();
    assert_eq!(outcome.stdout(), "abcdef");
    assert_eq!(site.node().input(&run_id), b"abcdef");
    assert_eq!(site.node().signals(&run_id), [10]);
}

#[test]
fn a_caller_that_closes_its_side_closes_stdin() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let mut run = client.start(reads(&["cat", "out:over"])).unwrap();
    client.send(&run, Input::Stdin("read ".into()));
    run.close();
    assert_eq!(client.finish(run).unwrap().stdout(), "read over");
}

#[test]
fn all_of_a_long_input_arrives_in_order() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let lines: String = (1..=200_000).map(|line| format!("{line}\n")).collect();
    let input = Bytes::from(lines.clone());
    let outcome = client.run_with_stdin(steps(&["cat"]), input).unwrap();
    assert!(outcome.stdout() == lines);
}

/// The run continues: its caller may come back.
#[test]
fn input_that_no_command_may_get_breaks_the_call_alone() {
    let site = Site::start(&[("anthropic", 4)]);
    let client = site.shim.client();
    let start = || client.start(reads(&["cat"])).unwrap();
    let long = Bytes::from(vec![0; (64 << 10) + 1]);
    is_invalid(&client, start(), Input::Stdin(long), "stdin");
    is_invalid(&client, start(), Input::Files("a".into()), "files");
    let signal = Input::Signal(Signal { number: 32 });
    is_invalid(&client, start(), signal, "signal.number");
    let (rows, columns) = (0, 80);
    let resize = Input::Resize(TerminalSize { rows, columns });
    is_invalid(&client, start(), resize, "resize.rows");
    assert!(site.node().asked().cancels.is_empty());
}

/// The shim does not wait for a command whose files will not arrive.
#[test]
fn a_run_whose_files_do_not_come_as_was_said_is_ended() {
    let site = Site::start(&[("anthropic", 2)]);
    let client = site.shim.client();
    let start = || client.start(waits_for_a_file()).unwrap();
    let (first, second) = (start(), start());
    let ids = [&first, &second].map(|run| run.accepted.run_id.clone());
    is_invalid(&client, first, Input::Files("abcd".into()), "files");
    is_invalid(&client, second, Input::Stdin("abc".into()), "stdin");
    let cancels = site.node().asked().cancels;
    let cancelled: Vec<_> = cancels.into_iter().map(|cancel| cancel.run_id).collect();
    assert_eq!(cancelled, ids);
}
