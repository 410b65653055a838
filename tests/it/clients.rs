//! The clients of `clients/`, installed as users install them, and grpcurl: every call of the
//! API, and runs that continue after their shim is killed.

mod calls;
mod grpcurl;

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use bytes::Bytes;
use futures_util::StreamExt;
use nix::sys::signal::Signal;
use polydev_client::{Client, Identity, api};
use polydev_tests::{
    client::shell, folder::Folder, nomad::Nomad, process::succeed, program, root, shim::Shim,
};
use tokio::runtime::Runtime;

use crate::credentials::key_file;

/// The clients for Node and Python, installed.
struct Installed {
    node: PathBuf,
    python: PathBuf,
    /// The folder in which scripts find the client for Node.
    scripts: Folder,
}

impl Installed {
    fn get() -> Self {
        let folder = succeed(&mut Command::new(root().join("tests/clients.sh")));
        let folder = PathBuf::from(folder.trim());
        let scripts = Folder::new("pdclients-");
        let modules = scripts.path().join("node_modules");
        std::os::unix::fs::symlink(folder.join("node/node_modules"), modules).expect("it is there");
        Self {
            node: "node".into(),
            python: folder.join("python/bin/python"),
            scripts,
        }
    }

    /// A command for a script that calls `shim`. The script's suffix decides the language.
    fn command(&self, name: &str, text: &str, shim: &Shim) -> Command {
        let script = self.scripts.path().join(name);
        fs::write(&script, text).expect("a file of the tests");
        let interpreter = if name.ends_with(".py") {
            &self.python
        } else {
            &self.node
        };
        let mut command = Command::new(interpreter);
        command.arg(script).env("POLYDEV_ADDRESS", &shim.address);
        command
    }

    fn of_tests(&self, name: &str, shim: &Shim) -> Command {
        let text = fs::read_to_string(root().join("tests/clients").join(name))
            .expect("a file of the tests");
        self.command(name, &text, shim)
    }
}

/// The first example of a README.
fn example(client: &str, language: &str) -> String {
    let readme = root().join("clients").join(client).join("README.md");
    let readme = fs::read_to_string(readme).expect("a file of the tests");
    let (_, rest) = readme
        .split_once(&format!("```{language}\n"))
        .expect("it is there");
    rest.split_once("```\n").expect("it is there").0.to_owned()
}

#[test]
fn the_examples_of_their_readmes_do_what_they_say() {
    let installed = Installed::get();
    let shim = Shim::dev(&["anthropic=1"]);
    let of_rust = fs::read_to_string(root().join("clients/rust/examples/run.rs")).unwrap();
    assert_eq!(example("rust", "rust,no_run"), of_rust);
    let mut of_rust = Command::new(program("client-example"));
    of_rust.env("POLYDEV_ADDRESS", &shim.address);
    for mut command in [
        of_rust,
        installed.command("example.py", &example("python", "python"), &shim),
        installed.command("example.mjs", &example("node", "js"), &shim),
    ] {
        assert_eq!(succeed(&mut command), "HELLO\nexit 3\n");
    }
}

/// Everything may run, and one command needs an approval.
const RULES: &str = r#"
permit (principal, action, resource is Polydev::Provider);

@outcome("step_up")
@reason("ask somebody")
forbid (principal, action, resource is Polydev::Provider)
when { context.program == "needs-approval" };
"#;

/// A shim in front of an agent with two pools, one of them without slots, and with a store.
fn serve(nomad: &Nomad, slots: u32, folder: &Folder) -> Shim {
    nomad.submit_pool("anthropic", slots);
    nomad.submit_pool("google", 0);
    let store = format!("sqlite://{}", folder.path().join("store.db").display());
    let keys = key_file(folder.path(), &[rand::random()]);
    let rules = folder.path().join("rules.cedar");
    fs::write(&rules, RULES).expect("a file can be written");
    let rules = rules.display().to_string();
    let options = [
        "--policy",
        &rules,
        "--master-key-file",
        &keys,
        "--credential-store",
        &store,
        "--stop-timeout",
        "1",
    ];
    let shim = Shim::serve_with(&nomad.address, &options);
    shim.client().wait_idle("anthropic", slots);
    shim
}

#[test]
fn every_call_is_made_by_each_of_them() {
    let (nomad, folder) = (Nomad::start(), Folder::new("pdstore-"));
    nomad.submit_pool_with("python", 1, "agent=false");
    let shim = serve(&nomad, 2, &folder);
    shim.client().wait_idle("python", 1);
    let installed = Installed::get();
    let all = calls::of_the_protocol();
    for script in ["calls.py", "calls.mjs"] {
        let told = succeed(&mut installed.of_tests(script, &shim));
        let made: BTreeSet<String> = told.lines().map(str::to_owned).collect();
        assert_eq!(made, all, "{script}");
    }
    assert_eq!(calls::of_rust(&shim), all);
    assert_eq!(grpcurl::calls(&shim), all);
}

/// A script that reports its progress.
struct Talking {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Talking {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it is there");
        let lines = BufReader::new(child.stdout.take().expect("it is there")).lines();
        Self { child, lines }
    }

    #[track_caller]
    fn says(&mut self, words: &str) {
        let line = self
            .lines
            .next()
            .expect("it says something")
            .expect("it is there");
        assert_eq!(line, words);
    }
}

impl Drop for Talking {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

#[test]
fn runs_go_on_when_their_shim_is_stopped_or_killed() {
    let (nomad, folder) = (Nomad::start(), Folder::new("pdstore-"));
    let mut shim = serve(&nomad, 4, &folder);
    let installed = Installed::get();
    let scripts = ["resume.py", "resume.mjs"];
    let mut scripts = scripts.map(|script| Talking::start(installed.of_tests(script, &shim)));
    let mut by_hand = shim.run_command();
    by_hand.args(["anthropic", "--", "sh", "-c", "echo running; exec cat"]);
    let mut by_hand = Talking::start(by_hand);
    let runtime = Runtime::new().unwrap();
    let data: Bytes = (0..3_000_000_u32)
        .map(|at| (at % 251).to_le_bytes()[0])
        .collect();
    let mut of_rust = runtime.block_on(async {
        let address = shim.address.parse().unwrap();
        let client = Client::connect(&address, Identity::default())
            .await
            .unwrap();
        let text = vec!["cat".into()];
        let argv = api::Argv {
            text,
            ..Default::default()
        };
        let run = client.run(api::RunStart {
            user_id: "rust".into(),
            provider: "anthropic".into(),
            command: Some(api::run_start::Command::Argv(argv)),
            stdin: true,
            ..Default::default()
        });
        let input = run.input();
        let data = data.clone();
        tokio::spawn(async move { input.write(data).await });
        run
    });
    let read = |run: &mut polydev_client::Run, until: usize, from: &mut Vec<u8>| {
        runtime.block_on(async {
            while from.len() < until {
                let event = run.next().await.unwrap().unwrap();
                if let api::run_event::Event::Stdout(output) = event {
                    from.extend_from_slice(&output.data);
                }
            }
        });
    };
    let mut written = Vec::new();
    read(&mut of_rust, 1, &mut written);
    for script in &mut scripts {
        script.says("running");
    }
    by_hand.says("running");

    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        shim.process.end(signal);
        shim.restart();
    }
    for script in &mut scripts {
        script
            .child
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"go on\n")
            .unwrap();
        script.says("whole");
    }
    let mut stdin = by_hand.child.stdin.take().unwrap();
    stdin.write_all(b"whole\n").unwrap();
    drop(stdin);
    by_hand.says("whole");
    assert_eq!(by_hand.child.wait().unwrap().code(), Some(0));
    read(&mut of_rust, data.len(), &mut written);
    assert!(written == data);
}

#[test]
fn a_run_that_is_dropped_while_it_waits_is_given_up() {
    let shim = Shim::dev(&["anthropic=1"]);
    let raw = shim.client();
    let first = raw.start(shell("anthropic", "sleep 300")).unwrap();
    let runtime = Runtime::new().unwrap();
    let queued = runtime.block_on(async {
        let address = shim.address.parse().unwrap();
        let client = Client::connect(&address, Identity::default())
            .await
            .unwrap();
        let mut run = client.run(shell("anthropic", "true"));
        let event = run.next().await.unwrap().unwrap();
        assert!(
            matches!(event, api::run_event::Event::Queued(_)),
            "{event:?}"
        );
        run
    });
    let given_up = queued.run_id().to_owned();
    let input = queued.input();
    drop(queued);
    assert!(runtime.block_on(input.write("more")).is_err());
    raw.cancel(&first.accepted.run_id).unwrap();
    raw.finish(first).unwrap();
    raw.wait_idle("anthropic", 1);
    assert!(raw.get_run(&given_up).is_err(), "the run exists");
}
