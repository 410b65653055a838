//! The clients of `clients/`, as their users have them, and grpcurl: every call of the API, and
//! runs that go on when their shim is killed.

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
use polydev_proto::DESCRIPTORS;
use polydev_tests::{
    folder::Folder,
    nomad::Nomad,
    process::{output, succeed},
    program, root,
    shim::Shim,
};
use prost::Message;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::credentials::key_file;

/// The clients for Node and Python, installed.
struct Installed {
    node: PathBuf,
    python: PathBuf,
    /// Where scripts find the one for Node.
    scripts: Folder,
}

impl Installed {
    fn get() -> Self {
        let folder = succeed(&mut Command::new(root().join("tests/clients.sh")));
        let folder = PathBuf::from(folder.trim());
        let scripts = Folder::new("pdclients-");
        let modules = scripts.path().join("node_modules");
        std::os::unix::fs::symlink(folder.join("node/node_modules"), modules).unwrap();
        Self {
            node: "node".into(),
            python: folder.join("python/bin/python"),
            scripts,
        }
    }

    /// A script of either language, by its suffix, with `shim` to talk to.
    fn command(&self, name: &str, text: &str, shim: &Shim) -> Command {
        let script = self.scripts.path().join(name);
        fs::write(&script, text).unwrap();
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
        let text = fs::read_to_string(root().join("tests/clients").join(name)).unwrap();
        self.command(name, &text, shim)
    }
}

/// The first example of a README.
fn example(client: &str, language: &str) -> String {
    let readme = root().join("clients").join(client).join("README.md");
    let readme = fs::read_to_string(readme).unwrap();
    let (_, rest) = readme.split_once(&format!("```{language}\n")).unwrap();
    rest.split_once("```\n").unwrap().0.to_owned()
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

/// A shim in front of an agent with two pools, one of them without slots, and with a store.
fn serve(nomad: &Nomad, slots: u32, folder: &Folder) -> Shim {
    nomad.submit_pool("anthropic", slots);
    nomad.submit_pool("google", 0);
    let store = format!("sqlite://{}", folder.path().join("store.db").display());
    let keys = key_file(folder.path(), &[rand::random()]);
    let options = ["--master-key-file", &keys, "--credential-store", &store];
    let shim = Shim::serve_with(&nomad.address, &options);
    shim.client().wait_idle("anthropic", slots);
    shim
}

#[test]
fn every_call_is_made_by_each_of_them() {
    let (nomad, folder) = (Nomad::start(), Folder::new("pdstore-"));
    let shim = serve(&nomad, 2, &folder);
    let installed = Installed::get();
    let calls = calls_of_the_protocol();
    for script in ["calls.py", "calls.mjs"] {
        let told = succeed(&mut installed.of_tests(script, &shim));
        let made: BTreeSet<String> = told.lines().map(str::to_owned).collect();
        assert_eq!(made, calls, "{script}");
    }
    assert_eq!(calls_of_rust(&shim), calls);
    assert_eq!(calls_of_grpcurl(&shim), calls);
}

fn calls_of_the_protocol() -> BTreeSet<String> {
    let files = prost_types::FileDescriptorSet::decode(DESCRIPTORS)
        .unwrap()
        .file;
    let runtime = files
        .into_iter()
        .find(|file| file.package() == "polydev.runtime.v1")
        .unwrap();
    let service = runtime.service.into_iter().next().unwrap();
    service
        .method
        .iter()
        .map(|method| method.name().to_owned())
        .collect()
}

fn calls_of_rust(shim: &Shim) -> BTreeSet<String> {
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let address = shim.address.parse().unwrap();
        let client = Client::connect(&address, Identity::default())
            .await
            .unwrap();
        let mut made = BTreeSet::new();
        let mut done = |name: &str| assert!(made.insert(name.to_owned()));
        let mut calls = client.calls();
        let (user_id, provider) = ("rust".to_owned(), "anthropic".to_owned());
        let google = "google".to_owned();

        let status = calls
            .get_cluster_status(api::GetClusterStatusRequest {})
            .await;
        assert!(status.unwrap().into_inner().nodes[0].reachable);
        done("GetClusterStatus");
        let pools = calls.list_pools(api::ListPoolsRequest {}).await;
        assert_eq!(pools.unwrap().into_inner().pools.len(), 3);
        done("ListPools");
        let request = api::GetPoolRequest {
            provider: provider.clone(),
        };
        let pool = calls.get_pool(request).await.unwrap().into_inner();
        assert_eq!(pool.slots.len(), 2);
        done("GetPool");
        let watched = calls.watch_pools(api::WatchPoolsRequest {}).await;
        let first = watched.unwrap().into_inner().message().await.unwrap();
        assert_eq!(first.unwrap().pools.len(), 3);
        done("WatchPools");
        let request = api::ScalePoolRequest {
            provider: google.clone(),
            size: 0,
        };
        let scaled = calls.scale_pool(request).await.unwrap().into_inner();
        let scaled = scaled
            .map(|event| event.unwrap().event.unwrap())
            .collect::<Vec<_>>();
        let is_scaled = matches!(
            scaled.await[..],
            [.., api::scale_pool_response::Event::Scaled(_)]
        );
        assert!(is_scaled);
        done("ScalePool");
        let request = api::DrainPoolRequest {
            provider: google.clone(),
        };
        let drained = calls.drain_pool(request).await.unwrap().into_inner();
        let drained = drained
            .map(|event| event.unwrap().event.unwrap())
            .collect::<Vec<_>>();
        let is_drained = matches!(
            drained.await[..],
            [.., api::drain_pool_response::Event::Drained(_)]
        );
        assert!(is_drained);
        done("DrainPool");
        let request = api::ResumePoolRequest { provider: google };
        let resumed = calls.resume_pool(request).await.unwrap().into_inner();
        let resumed = resumed
            .map(|event| event.unwrap().event.unwrap())
            .collect::<Vec<_>>();
        let is_resumed = matches!(
            resumed.await[..],
            [.., api::resume_pool_response::Event::Scaled(_)]
        );
        assert!(is_resumed);
        done("ResumePool");

        let variables = [("SECRET".to_owned(), "of the store".to_owned())].into();
        let kind = api::secret::Kind::Environment(api::SecretEnvironment { variables });
        let secret = api::credential::Source::Secret(api::Secret { kind: Some(kind) });
        let put = api::PutCredentialRequest {
            user_id: user_id.clone(),
            provider: provider.clone(),
            credential: Some(api::Credential {
                source: Some(secret),
            }),
        };
        let put = calls.put_credential(put).await.unwrap().into_inner();
        assert_eq!(put.credential.unwrap().version, 1);
        done("PutCredential");
        let request = api::ListCredentialsRequest {
            user_id: user_id.clone(),
            ..Default::default()
        };
        let listed = calls.list_credentials(request).await.unwrap().into_inner();
        assert_eq!(listed.credentials.len(), 1);
        done("ListCredentials");
        let rotated = calls
            .rotate_credentials(api::RotateCredentialsRequest::default())
            .await;
        assert_eq!(rotated.unwrap().into_inner().left, 0);
        done("RotateCredentials");

        let watch = api::WatchRunsRequest {
            user_id: user_id.clone(),
            ..Default::default()
        };
        let mut watched = calls.watch_runs(watch).await.unwrap().into_inner();
        let stored = api::credential::Source::Stored(api::StoredCredential {});
        let argv = |argv: &[&str]| {
            let text = argv.iter().map(ToString::to_string).collect();
            let argv = api::Argv {
                text,
                ..Default::default()
            };
            Some(api::run_start::Command::Argv(argv))
        };
        let start = api::RunStart {
            user_id: user_id.clone(),
            provider: provider.clone(),
            ..Default::default()
        };
        let mut run = client.run(api::RunStart {
            command: argv(&[
                "sh",
                "-c",
                r#"read line; echo "$line $SECRET"; exec sleep 300"#,
            ]),
            credential: Some(api::Credential {
                source: Some(stored),
            }),
            stdin: true,
            ..start.clone()
        });
        let run_id = run.run_id().to_owned();
        run.input().write("line\n").await.unwrap();
        while !matches!(run.next().await.unwrap().unwrap(), api::run_event::Event::Stdout(output)
            if output.data == "line of the store\n")
        {}
        done("Run");
        let is_it = |told: api::WatchRunsResponse| told.runs.iter().any(|run| run.run_id == run_id);
        while !is_it(watched.message().await.unwrap().unwrap()) {}
        done("WatchRuns");
        let request = api::GetRunRequest {
            run_id: run_id.clone(),
            user_id: user_id.clone(),
        };
        let shown = calls
            .get_run(request)
            .await
            .unwrap()
            .into_inner()
            .run
            .unwrap();
        assert_eq!(shown.state(), api::RunState::Running);
        done("GetRun");
        let request = api::ListRunsRequest {
            user_id: user_id.clone(),
            ..Default::default()
        };
        let listed = calls.list_runs(request).await.unwrap().into_inner().runs;
        assert_eq!(listed.len(), 1);
        done("ListRuns");
        let attach = |run_id: &str| {
            client.attach(api::AttachStart {
                run_id: run_id.into(),
                user_id: user_id.clone(),
                ..Default::default()
            })
        };
        let again = attach(&run_id);
        let cancel = api::CancelRunRequest {
            run_id: run_id.clone(),
            user_id: user_id.clone(),
        };
        calls.cancel_run(cancel).await.unwrap();
        done("CancelRun");
        assert_eq!(
            text(again).await,
            ("line of the store\n".into(), api::ExitReason::Cancelled)
        );
        done("Attach");

        let start = api::RunStart {
            command: argv(&["echo", "job"]),
            ..start
        };
        let submit = api::SubmitJobRequest {
            start: Some(start.clone()),
        };
        let accepted = calls
            .submit_job(submit)
            .await
            .unwrap()
            .into_inner()
            .accepted
            .unwrap();
        let job = ("job\n".to_owned(), api::ExitReason::Exited);
        assert_eq!(text(attach(&accepted.run_id)).await, job);
        done("SubmitJob");
        let request = api::AllocateRequest {
            user_id: user_id.clone(),
            provider: provider.clone(),
            ..Default::default()
        };
        let lease = calls
            .allocate(request.clone())
            .await
            .unwrap()
            .into_inner()
            .lease
            .unwrap();
        assert_eq!(
            text(client.run(api::RunStart {
                lease_id: lease.lease_id,
                ..start
            }))
            .await,
            job
        );
        done("Allocate");
        let lease = calls
            .allocate(request)
            .await
            .unwrap()
            .into_inner()
            .lease
            .unwrap();
        let release = api::ReleaseRequest {
            lease_id: lease.lease_id,
            user_id: user_id.clone(),
        };
        calls.release(release).await.unwrap();
        done("Release");
        let delete = api::DeleteCredentialRequest { user_id, provider };
        calls.delete_credential(delete).await.unwrap();
        done("DeleteCredential");
        made
    })
}

/// What a run writes, until it ends, and why it does.
async fn text(mut run: polydev_client::Run) -> (String, api::ExitReason) {
    let mut written = Vec::new();
    loop {
        match run.next().await.unwrap().unwrap() {
            api::run_event::Event::Stdout(output) => written.extend_from_slice(&output.data),
            api::run_event::Event::Exited(exited) => {
                return (String::from_utf8(written).unwrap(), exited.reason());
            }
            _ => {}
        }
    }
}

/// Without the protocol's files: by reflection.
fn calls_of_grpcurl(shim: &Shim) -> BTreeSet<String> {
    let grpcurl = succeed(&mut Command::new(root().join("tests/grpcurl.sh")));
    let mut made = BTreeSet::new();
    let mut call = |method: &str, options: &[&str], request: Value| -> Vec<Value> {
        let mut command = Command::new(grpcurl.trim());
        command.args(["-plaintext", "-emit-defaults"]).args(options);
        command.args(["-d", &request.to_string(), &shim.address]);
        command.arg(format!("polydev.runtime.v1.RuntimeService/{method}"));
        let answered = output(&mut command);
        let words = String::from_utf8_lossy(&answered.stderr).into_owned();
        // Those that do not end by themselves.
        let is_late = options.contains(&"-max-time") && words.contains("DeadlineExceeded");
        assert!(answered.status.success() || is_late, "{method}: {words}");
        made.insert(method.to_owned());
        let answers = serde_json::Deserializer::from_slice(&answered.stdout);
        answers.into_iter::<Value>().map(Result::unwrap).collect()
    };
    let short = ["-max-time", "2"];
    let user = json!({ "user_id": "grpcurl" });
    let name = json!({ "user_id": "grpcurl", "provider": "anthropic" });
    let google = json!({ "provider": "google" });
    let run = |what: Value| {
        let mut run = name.clone();
        run.as_object_mut()
            .unwrap()
            .extend(what.as_object().unwrap().clone());
        run
    };
    assert_eq!(
        call("GetClusterStatus", &[], json!({}))[0]["nodes"][0]["reachable"],
        true
    );
    assert_eq!(
        call("ListPools", &[], json!({}))[0]["pools"][0]["provider"],
        "anthropic"
    );
    assert_eq!(
        call("GetPool", &[], json!({ "provider": "anthropic" }))[0]["pool"]["slots"],
        2
    );
    assert_eq!(
        call("WatchPools", &short, json!({}))[0]["nodesConnected"],
        1
    );
    let scaled = call("ScalePool", &[], json!({ "provider": "google", "size": 0 }));
    assert_eq!(scaled.last().unwrap()["scaled"]["to"], 0);
    assert!(call("DrainPool", &[], google.clone()).last().unwrap()["drained"].is_object());
    assert!(call("ResumePool", &[], google).last().unwrap()["scaled"].is_object());

    let secret = json!({ "environment": { "variables": { "SECRET": "of the store" } } });
    let put = call(
        "PutCredential",
        &[],
        run(json!({ "credential": { "secret": secret } })),
    );
    assert_eq!(put[0]["credential"]["version"], "1");
    let listed = call("ListCredentials", &[], user.clone());
    assert_eq!(
        listed[0]["credentials"][0]["kind"],
        "CREDENTIAL_KIND_ENVIRONMENT"
    );
    assert_eq!(call("RotateCredentials", &[], json!({}))[0]["left"], "0");

    let stored = json!({
        "argv": { "text": ["sh", "-c", "echo $SECRET"] }, "credential": { "stored": {} },
    });
    let events = call("Run", &[], json!({ "start": run(stored) }));
    let written = |event: &Value| event["event"]["stdout"]["data"] == "b2YgdGhlIHN0b3JlCg==";
    assert!(events.iter().any(written), "{events:?}");
    let sleeps = json!({ "argv": { "text": ["sleep", "300"] } });
    let submitted = call("SubmitJob", &[], json!({ "start": run(sleeps) }));
    let run_id = submitted[0]["accepted"]["runId"].clone();
    let of_run = json!({ "run_id": run_id, "user_id": "grpcurl" });
    assert_eq!(
        call("GetRun", &[], of_run.clone())[0]["run"]["runId"],
        run_id
    );
    assert_eq!(
        call("ListRuns", &[], user.clone())[0]["runs"][0]["runId"],
        run_id
    );
    let watched = call("WatchRuns", &short, user);
    assert!(
        watched
            .iter()
            .any(|told| told["runs"][0]["runId"] == run_id),
        "{watched:?}"
    );
    call("CancelRun", &[], of_run.clone());
    let events = call("Attach", &[], json!({ "start": of_run }));
    let last = &events.last().unwrap()["event"];
    assert_eq!(last["exited"]["reason"], "EXIT_REASON_CANCELLED");
    let lease_id = call("Allocate", &[], name.clone())[0]["lease"]["leaseId"].clone();
    call(
        "Release",
        &[],
        json!({ "lease_id": lease_id, "user_id": "grpcurl" }),
    );
    call("DeleteCredential", &[], name.clone());
    made
}

/// A script that says how far it has come.
struct Talking {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Talking {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    #[track_caller]
    fn says(&mut self, words: &str) {
        let line = self.lines.next().expect("it says something").unwrap();
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
fn runs_go_on_when_their_shim_is_killed() {
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

    shim.process.end(Signal::SIGKILL);
    shim.restart();
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
