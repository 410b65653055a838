//! Bad input: a clear error with the name of what is wrong, and nothing left.

use std::{process::Command, time::Duration};

use bytes::Bytes;
use polydev_proto::runtime::{Argv, RunStart, run_start};
use polydev_tests::{
    client::{argv, shell},
    docker,
    nomad::Nomad,
    process::{Process, output},
    program,
    shim::Shim,
    wait_until,
};
use tonic::Code;

#[test]
fn wrong_runs_are_refused_by_field_and_take_no_slot() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let long = "x".repeat(131_072);
    let with_args = |args: Vec<Bytes>| RunStart {
        command: Some(run_start::Command::Argv(Argv { args, text: vec![] })),
        ..shell("anthropic", "true")
    };
    let with_env = |name: &str| RunStart {
        env: [(name.to_owned(), "x".to_owned())].into(),
        ..shell("anthropic", "true")
    };
    let cases = [
        (shell("mistral", "true"), "`provider` is `mistral`"),
        (with_args(vec![]), "`argv`"),
        (
            with_args(vec!["sh".into(), Bytes::from_static(b"a\0b")]),
            "`argv[1]`",
        ),
        (argv("anthropic", &["echo", &long]), "`argv[1]`"),
        (
            with_args(vec![Bytes::from(long[1..].to_owned()); 13]),
            "`argv`",
        ),
        (with_env("A\0B"), "`env[\"A\\0B\"]`"),
        (with_env("LD_PRELOAD"), "`env[\"LD_PRELOAD\"]`"),
        (
            RunStart {
                user_id: String::new(),
                ..shell("anthropic", "true")
            },
            "`user_id`",
        ),
    ];
    for (start, field) in cases {
        let status = client.run(start).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(field), "{}", status.message());
    }
    let after = client.run(shell("anthropic", "true")).unwrap();
    assert_eq!(
        after.accepted.generation, 1,
        "a refused run took the slot's first container"
    );

    // A provider without slots: told after a wait, with how its pool stands.
    let status = client.run(shell("google", "true")).unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(
        status.message().contains("no slot of this provider"),
        "{}",
        status.message()
    );
}

#[test]
fn the_shim_listens_nowhere_but_on_this_machine() {
    for address in [
        "http://0.0.0.0:7070",
        "http://198.18.0.1:7070",
        "tcp://127.0.0.1:1",
    ] {
        for command in ["serve", "dev"] {
            let result =
                output(Command::new(program("polydev-shim")).args([command, "--listen", address]));
            assert!(!result.status.success());
            let text = String::from_utf8_lossy(&result.stderr).into_owned();
            assert!(text.contains(address), "{text}");
        }
    }
}

#[test]
fn the_driver_run_by_hand_says_what_it_is() {
    let result = output(&mut Command::new(program("nomad-driver-polydev")));
    assert_eq!(result.status.code(), Some(1));
    assert!(result.stdout.is_empty());
    let text = String::from_utf8_lossy(&result.stderr).into_owned();
    assert!(
        text.contains("Nomad task driver plugin") && text.contains("polydev-shim dev"),
        "{text}"
    );
    let version = output(Command::new(program("nomad-driver-polydev")).arg("--version"));
    assert!(version.status.success());
}

#[test]
fn a_second_driver_on_the_same_state_folder_names_the_first() {
    let shim = Shim::dev(&["anthropic=1"]);
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(program("polydev-shim"));
    command
        .args(["dev", "--pool", "anthropic=1", "--state-dir"])
        .arg(shim.state_dir());
    command
        .arg("--listen")
        .arg(format!("unix://{}/s", folder.path().display()));
    let second = Process::start(&mut command, &folder.path().join("log"));
    let held = std::fs::read_to_string(shim.state_dir().join("driver.lock")).unwrap();
    let expected = format!("is in use by another driver, pid {}", held.trim());
    wait_until("the reason", Duration::from_secs(20), || {
        let log = second.log();
        if log.contains(&expected) {
            Ok(())
        } else {
            Err(log)
        }
    });
    drop(second);
    assert_eq!(
        shim.client()
            .run(shell("anthropic", "echo hi"))
            .unwrap()
            .stdout(),
        "hi\n"
    );
}

#[test]
fn an_absent_docker_is_told_by_the_fingerprint() {
    let nomad = Nomad::launch(r#"endpoint = "unix:///nowhere/docker.sock""#);
    wait_until("an unhealthy driver", Duration::from_secs(60), || {
        let driver = nomad.driver();
        let reason = driver["HealthDescription"].as_str().unwrap_or_default();
        let told = reason.contains("/nowhere/docker.sock");
        if told && driver["Healthy"] == false {
            Ok(())
        } else {
            Err(driver.to_string())
        }
    });
}

#[test]
fn an_unknown_or_wrong_plugin_option_stops_the_agent_with_its_name() {
    for (option, name) in [
        ("colour = \"red\"", "colour"),
        ("run_class { cpu = 0 }", "run_class.cpu"),
    ] {
        let mut nomad = Nomad::launch(option);
        let agent = nomad.agent();
        let status = wait_until("the agent's end", Duration::from_secs(60), || {
            agent.exit().ok_or_else(|| "it runs".to_owned())
        });
        assert!(!status.success());
        assert!(agent.log().contains(name), "{}", agent.log());
    }
}

pub(crate) fn a_wrong_job_is_refused() {
    let nomad = Nomad::start();
    let job = |name: &str, config: &str| {
        format!(
            r#"job "{name}" {{
                 type = "batch"
                 group "g" {{
                   reschedule {{
                     attempts  = 0
                     unlimited = false
                   }}
                   restart {{
                     attempts = 0
                   }}
                   task "t" {{
                     driver = "polydev"
                     config {{
 {config}
 }}
                   }}
                 }}
               }}"#
        )
    };
    let cases = [
        ("neither", "command = \"sh\"", "image name required"),
        (
            "both",
            "command = \"sh\"\n slot {\n provider = \"google\"\n }",
            "next to `slot`",
        ),
        (
            "privileged",
            "image = \"polydev-busybox:1\"\n privileged = true",
            "`privileged`",
        ),
        (
            "cap",
            "image = \"polydev-busybox:1\"\n cap_add = [\"net_admin\"]",
            "`cap_add` is `net_admin`",
        ),
        (
            "host",
            "image = \"polydev-busybox:1\"\n pid_mode = \"host\"",
            "`pid_mode` is `host`",
        ),
        (
            "volume",
            "image = \"polydev-busybox:1\"\n volumes = [\"/etc:/x\"]",
            "volumes are not enabled",
        ),
        (
            "ulimit",
            "image = \"polydev-busybox:1\"\n ulimit {\n nofile = \"no\"\n }",
            "`ulimit.nofile`",
        ),
        (
            "port",
            "image = \"polydev-busybox:1\"\n ports = [\"http\"]",
            "`ports` is `http`",
        ),
        (
            "program",
            "image = \"polydev-busybox:1\"\n command = \"no-such-program\"",
            "no-such-program",
        ),
        (
            "provider",
            "slot {\n provider = \"mistral\"\n }",
            "slot.provider",
        ),
        (
            "option",
            "slot {\n provider = \"openai\"\n flavour = 1\n }",
            "flavour",
        ),
        ("kind", "slot {\n provider = [\"openai\"]\n }", "provider"),
        (
            "image",
            "slot {\n provider = \"openai\"\n image = \"127.0.0.1:1/no/such:1\"\n }",
            "slot.image",
        ),
    ];
    for (name, config, field) in cases {
        let file = nomad.folder().join(format!("{name}.nomad.hcl"));
        std::fs::write(&file, job(name, config)).expect("a file can be written");
        nomad.run(&["job", "run", "-detach", file.to_str().expect("it is text")]);
        let events = wait_until("a failed allocation", Duration::from_secs(90), || {
            let allocations = nomad.allocations(name);
            let failed = allocations
                .iter()
                .find(|alloc| alloc["ClientStatus"] == "failed");
            let failed = failed.ok_or_else(|| format!("{allocations:?}"))?;
            Ok(failed["TaskStates"]["t"]["Events"].to_string())
        });
        assert!(events.contains(field), "{name}: {events}");
    }
    let label = polydev_tests::shim::instance_label(&nomad.state_dir());
    assert!(docker::containers(&label).is_empty());
}
