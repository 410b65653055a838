//! Commands, from their start to their end.

use std::{
    fs::OpenOptions,
    io::Read,
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal as UnixSignal, kill},
    unistd::Pid,
};
use polydev_proto::{
    init::{
        ArtifactRules, DataAck, File, PlainTask, Refreshable, Release, Secrets, Signal, Start,
        Stdin, exited, from_init, hello, not_started, plain_task, to_init,
    },
    sealed::{self, PrivateKey},
};

use crate::init::{Init, Link, shell};

const O_NONBLOCK: i32 = nix::fcntl::OFlag::O_NONBLOCK.bits();

#[test]
fn no_byte_is_lost_or_doubled_when_the_driver_comes_and_goes() {
    let init = Init::start();
    let (mut link, state) = init.connect();
    assert!(matches!(state, hello::State::Waiting(_)));
    link.send(to_init::Message::Start(shell("seq 1 300000").into()));

    let mut stdout = Vec::new();
    // Each life of the driver takes a little, acknowledges less, and is gone.
    for life in 0..5u64 {
        while let from_init::Message::Data(data) = match link.next() {
            from_init::Message::Started(_) => link.next(),
            message => message,
        } {
            let at = usize::try_from(data.offset).unwrap();
            assert!(at <= stdout.len(), "a gap");
            stdout.truncate(at);
            stdout.extend_from_slice(&data.data);
            if stdout.len() as u64 > (life + 1) * 200_000 {
                break;
            }
            let offset = data.offset + data.data.len() as u64 / 2;
            link.send(to_init::Message::DataAck(DataAck {
                stream: data.stream,
                offset,
            }));
        }
        drop(link);
        let state;
        (link, state) = init.connect();
        // The last megabyte may be waiting in init, its command long gone.
        assert!(
            matches!(state, hello::State::Running(_) | hello::State::Exited(_)),
            "{state:?}"
        );
    }
    let exited = link.finish(&mut stdout);
    let expected: String = (1..=300_000).map(|n| format!("{n}\n")).collect();
    assert!(stdout == expected.as_bytes(), "{} bytes", stdout.len());
    assert_eq!(exited.stdout_bytes, expected.len() as u64);
    assert_eq!(exited.status, Some(exited::Status::Code(0)));
}

#[test]
fn a_refreshed_account_is_told_before_the_end_and_again_to_a_driver_that_comes_back() {
    let init = Init::start();
    let (mut link, public_key) = init.connect_for_key();
    let key = PrivateKey::generate();
    let secrets = Secrets {
        files: vec![File {
            path: "account/auth.json".into(),
            mode: 0o600,
            content: "given".into(),
        }],
        refreshable: Some(Refreshable {
            path: "account/auth.json".into(),
            public_key: key.public(),
            label: "label".into(),
        }),
        ..Secrets::default()
    };
    let start = Start {
        sealed_secrets: sealed::seal(&public_key, "run", &secrets).unwrap(),
        // The search for them may take long.
        artifacts: Some(ArtifactRules {
            patterns: vec!["*.txt".into()],
            max_bytes: 1,
            max_files: 1,
        }),
        ..shell("echo '{}' > ~/account/auth.json")
    };
    link.send(to_init::Message::Start(start.into()));
    let told = |link: &mut Link| loop {
        match link.next() {
            from_init::Message::Refreshed(told) => break told,
            from_init::Message::Exited(_) | from_init::Message::Collected(_) => {
                panic!("it was not told before the end")
            }
            _ => {}
        }
    };
    let first = told(&mut link);
    let file = key.open_refreshed(&first.sealed, &first.label).unwrap();
    assert_eq!((file.count, &*file.content), (1, &b"{}\n"[..]));
    link.finish(&mut Vec::new());
    drop(link);
    let (mut link, _) = init.connect();
    assert_eq!(told(&mut link), first);
}

#[test]
fn the_end_is_told_again_until_it_is_released() {
    let mut init = Init::start();
    let (mut link, _) = init.connect();
    link.send(to_init::Message::Start(shell("printf done; exit 3").into()));
    let mut stdout = Vec::new();
    assert_eq!(
        link.finish(&mut stdout).status,
        Some(exited::Status::Code(3))
    );
    drop(link);

    let (mut link, state) = init.connect();
    assert!(matches!(state, hello::State::Exited(_)));
    assert_eq!(
        link.finish(&mut stdout).status,
        Some(exited::Status::Code(3))
    );
    assert_eq!(stdout, b"done");
    link.send(to_init::Message::Release(Release {}));
    assert!(init.process.wait().unwrap().success());
}

/// A plain task's output goes into the descriptors that came with its start. Its end is
/// told at once; init goes when the output has been read, with the command's status.
#[test]
fn a_plain_task_writes_to_nomad_and_stays_until_it_is_read() {
    let mut init = Init::start();
    let (mut link, _) = init.connect();
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str| {
        let path = folder.path().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(O_NONBLOCK);
        options.open(path).unwrap()
    };
    let (mut stdout, stderr) = (open("stdout"), open("stderr"));
    let start = Start {
        timeout_ms: 0,
        task: Some(PlainTask {
            output: plain_task::Output::Descriptors.into(),
            tty: false,
        }),
        ..shell("seq 1 2000; exit 7")
    };
    link.send_with(
        to_init::Message::Start(start.into()),
        [stdout.as_fd(), stderr.as_fd()],
    );
    assert!(matches!(link.next(), from_init::Message::Started(_)));
    let from_init::Message::Exited(exited) = link.next() else {
        panic!("the end follows");
    };
    assert_eq!(exited.status, Some(exited::Status::Code(7)));
    link.send(to_init::Message::Release(Release {}));
    assert!(
        init.process.try_wait().unwrap().is_none(),
        "its output is not read yet"
    );

    let expected: String = (1..=2000).map(|line| format!("{line}\n")).collect();
    let mut text = vec![0; expected.len()];
    stdout.read_exact(&mut text).unwrap();
    assert!(text == expected.as_bytes());
    assert_eq!(init.process.wait().unwrap().code(), Some(7));
}

#[test]
fn one_command_in_a_life() {
    let init = Init::start();
    let (mut link, _) = init.connect();
    link.send(to_init::Message::Start(shell("exec sleep 1000").into()));
    assert!(matches!(link.next(), from_init::Message::Started(_)));
    link.send(to_init::Message::Start(shell("echo second").into()));
    // A driver that tries is not listened to any more; the first command goes on.
    let (_link, state) = init.connect();
    assert!(matches!(state, hello::State::Running(_)), "{state:?}");
}

#[test]
fn stdin_reaches_the_command_and_ends() {
    let init = Init::start();
    let (mut link, _) = init.connect();
    let start = Start {
        stdin: true,
        ..shell("cat; echo end")
    };
    link.send(to_init::Message::Start(start.into()));
    link.send(to_init::Message::Stdin(Stdin {
        offset: 0,
        data: "hello ".into(),
        close: false,
    }));
    link.send(to_init::Message::Stdin(Stdin {
        offset: 6,
        data: "world\n".into(),
        close: true,
    }));
    let mut stdout = Vec::new();
    link.finish(&mut stdout);
    assert_eq!(stdout, b"hello world\nend\n");
}

#[test]
fn a_deadline_is_kept_while_there_is_no_driver() {
    let init = Init::start();
    let (mut link, _) = init.connect();
    let start = Start {
        timeout_ms: 2_000,
        kill_timeout_ms: 200,
        ..shell("trap '' TERM; echo $$; while :; do sleep 0.05; done")
    };
    let began = Instant::now();
    link.send(to_init::Message::Start(start.into()));
    let pid = loop {
        if let from_init::Message::Data(data) = link.next() {
            break String::from_utf8(data.data.to_vec()).unwrap();
        }
    };
    drop(link);
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "before its deadline"
    );
    let command = Path::new("/proc").join(pid.trim());
    let limit = Instant::now() + Duration::from_secs(20);
    while command.exists() {
        assert!(Instant::now() < limit, "it runs on");
        std::thread::park_timeout(Duration::from_millis(10));
    }
    let (mut link, _) = init.connect();
    let exited = link.finish(&mut Vec::new());
    assert!(exited.deadline_exceeded);
    assert_eq!(exited.status, Some(exited::Status::Signal(9)));
}

#[test]
fn a_program_that_is_not_there_is_told_and_nothing_runs() {
    let init = Init::start();
    let (mut link, _) = init.connect();
    let start = Start {
        argv: vec!["no-such-program".into()],
        ..shell("")
    };
    link.send(to_init::Message::Start(start.into()));
    match link.next() {
        from_init::Message::NotStarted(refused) => {
            assert_eq!(refused.reason(), not_started::Reason::NotFound);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_signal_ends_a_waiting_init_and_is_passed_on_by_a_running_one() {
    let mut idle = Init::start();
    let (_link, _) = idle.connect();
    let pid = |init: &Init| Pid::from_raw(init.process.id().cast_signed());
    kill(pid(&idle), UnixSignal::SIGTERM).unwrap();
    assert!(idle.process.wait().unwrap().success());

    let running = Init::start();
    let (mut link, _) = running.connect();
    let script = "trap 'echo got it; exit 4' TERM; echo ready; while :; do sleep 0.05; done";
    link.send(to_init::Message::Start(shell(script).into()));
    while !matches!(link.next(), from_init::Message::Data(_)) {}
    kill(pid(&running), UnixSignal::SIGTERM).unwrap();
    let mut stdout = b"ready\n".to_vec();
    assert_eq!(
        link.finish(&mut stdout).status,
        Some(exited::Status::Code(4))
    );
    assert_eq!(stdout, b"ready\ngot it\n");
}

#[test]
fn a_real_time_signal_is_passed_on_and_its_end_is_told() {
    let init = Init::start();
    let (mut link, _) = init.connect();
    link.send(to_init::Message::Start(
        shell("echo ready; exec sleep 1000").into(),
    ));
    while !matches!(link.next(), from_init::Message::Data(_)) {}
    link.send(to_init::Message::Signal(Signal { number: 37 }));
    let exited = link.finish(&mut b"ready\n".to_vec());
    assert_eq!(exited.status, Some(exited::Status::Signal(37)));
}

#[test]
fn an_init_that_waits_ends_when_its_socket_is_gone_for_good() {
    let mut idle = Init::start();
    let (link, _) = idle.connect();
    std::fs::remove_file(idle.folder.path().join("init.sock")).unwrap();
    drop(link);
    assert!(idle.process.wait().unwrap().success());
}
