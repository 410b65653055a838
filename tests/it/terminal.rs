//! Runs with a terminal.

use std::{fs, process::Command};

use polydev_proto::runtime::{
    CloseStdin, RunStart, TerminalSize, run_event::Event, run_input::Input,
};
use polydev_tests::{
    client::{Client, Run, argv, shell},
    process::output,
    shim::Shim,
};
use tonic::Code;

const SIZE: TerminalSize = TerminalSize {
    rows: 24,
    columns: 80,
};

/// Reads until the terminal has shown `text`.
fn shown(client: &Client, run: &mut Run, text: &str) -> String {
    let mut shown = String::new();
    while !shown.contains(text) {
        match client.next(run).expect("the run goes on") {
            Some(Event::Stdout(output)) => shown.push_str(&String::from_utf8_lossy(&output.data)),
            Some(Event::Started(_)) => {}
            other => panic!("{other:?} after {shown:?}"),
        }
    }
    shown
}

#[test]
fn a_command_at_a_terminal_is_typed_to_and_told_its_size() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let bash = RunStart {
        stdin: true,
        terminal: Some(SIZE),
        ..argv("anthropic", &["bash", "--norc", "-i"])
    };
    let mut run = client.start(bash).unwrap();
    client.send(
        &run,
        Input::Stdin("stty size; tty; echo $TERM; echo err >&2\n".into()),
    );
    let text = shown(&client, &mut run, "\r\nerr\r\n");
    for line in ["\r24 80\r\n", "\n/dev/pts/0\r\n", "\nxterm\r\n"] {
        assert!(text.contains(line), "{text:?}");
    }
    client.send(
        &run,
        Input::Resize(TerminalSize {
            rows: 40,
            columns: 120,
        }),
    );
    client.send(&run, Input::Stdin("stty size\n".into()));
    shown(&client, &mut run, "\r40 120\r\n");
    // A key interrupts only the process in the foreground, which says that it is there itself.
    let foreground = "sh -c 'echo begins; exec sleep 1000'\n";
    client.send(&run, Input::Stdin(foreground.into()));
    shown(&client, &mut run, "\rbegins\r\n");
    client.send(&run, Input::Stdin(vec![3].into()));
    client.send(&run, Input::Stdin("echo status $?\n".into()));
    shown(&client, &mut run, "status 130\r\n");
    // The end of input ends a shell that waits for a command.
    client.send(&run, Input::Stdin("PS1='ready: '; (exit 7)\n".into()));
    shown(&client, &mut run, "\u{1b}[?2004hready: ");
    client.send(&run, Input::CloseStdin(CloseStdin {}));
    let exited = loop {
        if let Some(Event::Exited(exited)) = client.next(&mut run).unwrap() {
            break exited;
        }
    };
    assert_eq!((exited.exit_code, exited.stderr_bytes), (7, 0));

    let none = RunStart {
        terminal: Some(TerminalSize {
            rows: 0,
            columns: 80,
        }),
        ..shell("anthropic", "true")
    };
    let refused = client.start(none).map(drop).unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(
        refused.message().starts_with("`terminal.rows` is 0"),
        "{refused}"
    );
}

#[test]
fn the_command_line_gives_its_terminal_and_takes_it_back_as_it_was() {
    let shim = Shim::dev(&["anthropic=1"]);
    let folder = tempfile::tempdir().unwrap();
    let run = shim.command(&[
        "run",
        "-t",
        "anthropic",
        "--",
        "sh",
        "-c",
        "stty size; stty -a | tr ' ' '\\n' | grep -x icanon; exit 9",
    ]);
    let words = std::iter::once(run.get_program()).chain(run.get_args());
    let words: Vec<_> = words
        .map(|word| format!("'{}'", word.to_string_lossy().replace('\'', "'\\''")))
        .collect();
    // A separate terminal. The test compares the terminal's settings before and afterwards.
    let script = format!(
        "stty rows 30 cols 100; stty -g >before; {}; echo $? >status; stty -g >after",
        words.join(" ")
    );
    fs::write(folder.path().join("script"), script).unwrap();
    let mut at_terminal = Command::new("script");
    at_terminal
        .args(["--quiet", "--command", "sh ./script", "typed"])
        .env("POLYDEV_ADDRESS", &shim.address)
        .current_dir(folder.path());
    let ran = output(&mut at_terminal);
    let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
    let words = String::from_utf8_lossy(&ran.stdout);
    assert!(words.contains("30 100\r\nicanon\r\n"), "{words:?}");
    assert_eq!(read("status"), "9\n");
    assert_eq!(read("before"), read("after"));

    // Without a terminal, the command line refuses before anything runs.
    let none = output(&mut shim.command(&["run", "-t", "anthropic", "--", "true"]));
    assert_eq!(none.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&none.stderr).contains("--tty: stdin is not a terminal"));
}
