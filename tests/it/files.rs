//! Files that a run gets, and artifacts that a run leaves.

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use bytes::Bytes;
use polydev_proto::runtime::{
    Argv, ArtifactRules, CloseStdin, ExitReason, InputFile, RunStart, SubmitJobRequest, input_file,
    run_event::Event, run_input::Input, run_start::Command,
};
use polydev_tests::{
    client::{Client, Outcome, Run, shell},
    process::{output, succeed},
    shim::Shim,
};
use sha2::{Digest, Sha256};
use tonic::Code;

fn file(path: &str, size: usize) -> InputFile {
    InputFile {
        path: path.into(),
        mode: 0,
        source: Some(input_file::Source::Size(size as u64)),
    }
}

fn whole(path: &str, content: &'static str) -> InputFile {
    InputFile {
        source: Some(input_file::Source::Content(content.into())),
        ..file(path, 0)
    }
}

fn wanted(patterns: &[&str]) -> Option<ArtifactRules> {
    Some(ArtifactRules {
        patterns: patterns.iter().map(|text| (*text).to_owned()).collect(),
        ..ArtifactRules::default()
    })
}

/// Bytes that differ at all positions, so that a test sees a shifted or missing part.
fn content(length: usize) -> Bytes {
    let blocks = (0_u64..).flat_map(|block| Sha256::digest(block.to_be_bytes()));
    blocks.take(length).collect()
}

fn send(client: &Client, run: &Run, bytes: &Bytes) {
    let chunks = (0..bytes.len()).step_by(64 << 10);
    let chunks = chunks.map(|at| bytes.slice(at..bytes.len().min(at + (64 << 10))));
    client.send_all(run, chunks.map(Input::Files).collect());
}

/// A run with half of its files.
pub(crate) struct Gets {
    run: Run,
    rest: Bytes,
    expected: String,
}

pub(crate) fn gets(client: &Client) -> Gets {
    let bytes = content(3 << 20);
    let (half, rest) = (bytes.slice(..1_000_001), bytes.slice(1_000_001..));
    let start = RunStart {
        files: vec![file("a", 2 << 20), file("b/c", 1 << 20)],
        ..shell("anthropic", "cat a b/c | sha256sum")
    };
    let run = client.start(start).expect("the run goes on");
    send(client, &run, &half);
    let expected = format!("{}  -\n", hex::encode(Sha256::digest(&bytes)));
    Gets {
        run,
        rest,
        expected,
    }
}

impl Gets {
    /// Sends the other half of the files, and checks what the run read.
    pub(crate) fn finish(self, client: &Client) {
        send(client, &self.run, &self.rest);
        let outcome = client.finish(self.run).expect("the run goes on");
        assert_eq!(outcome.stdout(), self.expected, "{:?}", outcome.exited);
    }
}

/// A run whose caller has fetched half of its artifacts.
pub(crate) struct Leaves {
    run: Run,
    data: Vec<u8>,
}

const LEFT: usize = 40 << 20;

pub(crate) fn leaves(client: &Client) -> Leaves {
    let start = RunStart {
        artifacts: wanted(&["out"]),
        ..shell("anthropic", &format!("yes | head -c {LEFT} >out; exit 4"))
    };
    let mut run = client.start(start).expect("the run goes on");
    let mut data = Vec::new();
    while data.len() < 1 << 20 {
        if let Some(Event::ArtifactData(output)) = client.next(&mut run).expect("the run goes on") {
            data.extend_from_slice(&output.data);
        }
    }
    Leaves { run, data }
}

impl Leaves {
    /// Fetches the other half.
    pub(crate) fn finish(self, client: &Client) {
        let Self { mut run, mut data } = self;
        let exited = loop {
            match client.next(&mut run).expect("the run goes on") {
                Some(Event::ArtifactData(output)) => {
                    assert_eq!(output.offset, data.len() as u64, "a gap");
                    data.extend_from_slice(&output.data);
                }
                Some(Event::Exited(exited)) => break exited,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((exited.exit_code, exited.artifact_bytes), (4, LEFT as u64));
        assert_eq!(data.len(), LEFT);
        assert!(data.chunks(2).all(|line| line == b"y\n"));
    }
}

#[test]
fn a_script_is_brought_and_what_it_makes_is_taken_home() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let script = "#!/bin/sh\npwd; mkdir -p out/deep; cp data/large out/copy; chmod 750 out/copy; \
                  echo x >out/deep/x; ln -s /etc/passwd out/link; mkfifo out/pipe; echo >out/.hidden; \
                  echo secret >out/aa; chmod 0 out/aa; exit 5\n";
    fs::write(path("script.sh"), script).unwrap();
    fs::set_permissions(path("script.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    let large = content(9_000_000);
    fs::write(path("large"), &large).unwrap();
    let ran = output(&mut shim.command(&[
        "run",
        "anthropic",
        "--file",
        &path("script.sh"),
        "--file",
        &format!("{}:data/large", path("large")),
        "--artifact",
        "out/**/*",
        "--artifacts-to",
        &path("home"),
        "--",
        "./script.sh",
    ]));
    let words = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(5), "{words}");
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "/workspace\n");
    assert!(fs::read(path("home/out/copy")).unwrap() == large);
    let mode = fs::metadata(path("home/out/copy")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o750);
    assert_eq!(fs::read_to_string(path("home/out/deep/x")).unwrap(), "x\n");
    for left_out in [
        "`out/deep` is left out: it is a folder",
        "`out/link` is left out: it is a link",
        "`out/pipe` is left out: it is a FIFO",
        "`out/aa` is left out: Permission denied",
    ] {
        assert!(words.contains(left_out), "{words}");
    }
    assert_eq!(fs::read_dir(path("home/out")).unwrap().count(), 2);

    // The next run has an empty workspace. The report names artifacts beyond a limit.
    client.wait_idle("anthropic", 1);
    let limited = RunStart {
        artifacts: Some(ArtifactRules {
            max_bytes: 3,
            ..wanted(&["*"]).unwrap()
        }),
        ..shell(
            "anthropic",
            "ls; echo aa >a; echo b >b; head -c 300m /dev/zero >c",
        )
    };
    let outcome = client.run(limited).unwrap();
    assert_eq!(outcome.stdout(), "");
    assert!(
        outcome.stderr().contains("No space left"),
        "{}",
        outcome.stderr()
    );
    assert_eq!(
        (outcome.artifacts.files.len(), &*outcome.artifact_data),
        (1, &b"aa\n"[..])
    );
    assert_eq!(outcome.artifacts.left_out_count, 2);
}

#[test]
fn a_job_has_its_files_and_keeps_its_artifacts() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let submit = |start: RunStart| {
        let request = SubmitJobRequest { start: Some(start) };
        client.call(async |mut shim| shim.submit_job(request).await)
    };
    let start = |files| RunStart {
        files,
        artifacts: wanted(&["made"]),
        ..shell("anthropic", "ls; cat a b c | rev | tee made")
    };
    let follow = submit(start(vec![file("a", 3)])).unwrap_err();
    assert_eq!(follow.code(), Code::InvalidArgument);
    let words = "`files` is `some by their size`";
    assert!(follow.message().starts_with(words), "{follow}");
    let some = client.start(start(vec![file("a", 3), whole("b", "b")]));
    let some = some.map(drop).unwrap_err();
    let words = "`files` is `1 of 2 with their content`";
    assert!(some.message().starts_with(words), "{some}");
    let files = vec![whole("a", "abc"), whole("b", ""), whole("c", "de")];
    let accepted = submit(start(files.clone())).unwrap().accepted.unwrap();
    let run = client.attach(&accepted.run_id, [0; 2]).unwrap();
    let outcome = client.finish(run).unwrap();
    assert_eq!(outcome.stdout(), "a\nb\nc\nedcba");
    assert_eq!(outcome.artifact_data, b"edcba");
    assert_eq!(outcome.artifacts.files[0].path, "made");

    // Once more, because the run has ended meanwhile.
    let again = client.attach(&accepted.run_id, [0; 2]).unwrap();
    let again = client.finish(again).unwrap();
    assert_eq!(again.artifact_data, b"edcba");

    // The same with a caller.
    client.wait_idle("anthropic", 1);
    let outcome = client.run(start(files)).unwrap();
    assert_eq!(outcome.artifact_data, b"edcba");

    client.wait_idle("anthropic", 1);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs::write(path("in"), "detached\n").unwrap();
    let run_id = succeed(&mut shim.command(&[
        "run",
        "anthropic",
        "--detach",
        "--file",
        &path("in"),
        "--artifact",
        "out",
        "--",
        "sh",
        "-c",
        "cp in out; cat in",
    ]));
    let attach = ["runs", "attach", run_id.trim(), "--artifacts-to", &path("")];
    assert_eq!(succeed(&mut shim.command(&attach)), "detached\n");
    assert_eq!(fs::read_to_string(path("out")).unwrap(), "detached\n");
}

/// No real CLI runs: the program that reads the prompt has the name of one.
#[test]
fn a_prompt_too_long_for_an_argument_is_the_commands_stdin() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let text: String = (0..300_000).map(|line| format!("{line}\n")).collect();
    assert!(text.len() > 1 << 20);
    let claude = "#!/bin/sh\necho \"$@\"; cat\n";
    let long = |stdin| RunStart {
        command: Some(Command::Prompt(polydev_proto::runtime::Prompt {
            text: text.clone(),
            model: "opus".into(),
            ..Default::default()
        })),
        files: vec![InputFile {
            mode: 0o755,
            ..file("bin/claude", claude.len())
        }],
        env: [("PATH".to_owned(), "/workspace/bin:/usr/bin:/bin".to_owned())].into(),
        stdin,
        ..shell("anthropic", "")
    };
    let run = client.start(long(false)).unwrap();
    send(&client, &run, &claude.into());
    let outcome = client.finish(run).unwrap();
    assert!(
        outcome.stdout() == format!("-p --dangerously-skip-permissions --model opus\n{text}"),
        "{:?}",
        outcome.exited
    );

    client.wait_idle("anthropic", 1);
    let script = InputFile {
        mode: 0o755,
        ..whole("bin/claude", claude)
    };
    let start = Some(RunStart {
        files: vec![script],
        ..long(false)
    });
    let request = SubmitJobRequest { start };
    let submitted = client.call(async |mut shim| shim.submit_job(request).await);
    let run_id = submitted.unwrap().accepted.unwrap().run_id;
    let outcome = client
        .finish(client.attach(&run_id, [0; 2]).unwrap())
        .unwrap();
    assert!(outcome.stdout().ends_with(&text));

    let both = client.start(long(true)).map(drop).unwrap_err();
    assert_eq!(both.code(), Code::InvalidArgument);
    assert!(both.message().starts_with("`stdin` "), "{both}");
}

fn with(files: Vec<InputFile>) -> RunStart {
    RunStart {
        files,
        ..shell("anthropic", "true")
    }
}

#[test]
fn files_that_cannot_be_taken_start_nothing() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let refused = |start: RunStart, words: &str| {
        let status = client.start(start).map(drop).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(words), "{status}");
    };
    for path in ["", "/etc/passwd", "../a", "a/./b", "a\nb"] {
        refused(with(vec![file(path, 1)]), "`files[0].path` ");
    }
    refused(with(vec![file("a", 1), file("a/b", 1)]), "`files[0].path` ");
    refused(with(vec![file("a", 1 << 40)]), "`files[0].size` ");
    refused(
        with(vec![InputFile {
            mode: 0o4755,
            ..file("a", 1)
        }]),
        "`files[0].mode` ",
    );
    let rules = |patterns: &[&str]| RunStart {
        artifacts: wanted(patterns),
        ..shell("anthropic", "true")
    };
    refused(rules(&[]), "`artifacts.patterns` ");
    refused(rules(&["ok", "/etc/*"]), "`artifacts.patterns[1]` ");
    files_that_come_too_early_too_long_or_cut_short_start_nothing(&client);
}

fn files_that_come_too_early_too_long_or_cut_short_start_nothing(client: &Client) {
    let gives = |start: RunStart, inputs: Vec<Input>| -> Result<Outcome, tonic::Status> {
        client.wait_idle("anthropic", 1);
        let run = client.start(start).expect("its files are to come");
        for input in inputs {
            client.send(&run, input);
        }
        client.finish(run)
    };
    let early = gives(
        RunStart {
            stdin: true,
            ..with(vec![file("a", 2)])
        },
        vec![Input::Files("a".into()), Input::Stdin("b".into())],
    );
    let early = early.expect_err("a refusal");
    assert!(
        early
            .message()
            .starts_with("`stdin` is `sent with 1 bytes of the files missing`"),
        "{early}"
    );
    let many = gives(with(vec![file("a", 2)]), vec![Input::Files("abc".into())]);
    let many = many.expect_err("a refusal");
    assert!(
        many.message()
            .starts_with("`files` is `3 bytes, of which only 2 are expected`"),
        "{many}"
    );

    // The caller is gone, so the files will not arrive.
    let few = gives(
        with(vec![file("a", 2)]),
        vec![Input::Files("a".into()), Input::CloseStdin(CloseStdin {})],
    );
    let few = few.expect("a clean end");
    assert_eq!(few.exited.reason(), ExitReason::NotStarted);
    assert_eq!(few.exited.message, "its files ended after 1 of 2 bytes");
}

#[test]
fn a_run_that_waits_for_its_files_can_be_ended_and_gone_back_to() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let waits = client.start(with(vec![file("a", 2)])).unwrap();
    client.cancel(&waits.accepted.run_id).unwrap();
    let ended = client.finish(waits).unwrap();
    assert_eq!(ended.exited.reason(), ExitReason::Cancelled);

    // A caller that comes back continues its files at the run's offset.
    client.wait_idle("anthropic", 1);
    let start = RunStart {
        command: Some(Command::Argv(Argv {
            text: vec!["cat".into(), "a".into()],
            args: vec![],
        })),
        ..with(vec![file("a", 6)])
    };
    let first = client.start(start).unwrap();
    let run_id = first.accepted.run_id.clone();
    client.send(&first, Input::Files("abc".into()));
    let taken = || {
        let again = client.attach(&run_id, [0; 2]).unwrap();
        match again.accepted.files_offset {
            3 => Ok(again),
            other => Err(other.to_string()),
        }
    };
    let again = polydev_tests::wait_until("its first bytes", Duration::from_secs(10), taken);
    assert_eq!(again.accepted.stdin_offset, 0);
    drop(first);
    client.send(&again, Input::Files("def".into()));
    assert_eq!(client.finish(again).unwrap().stdout(), "abcdef");
}
