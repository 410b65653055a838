//! Bad input: the error is clear and names the wrong part, and nothing is left behind.

use std::{process::Command, time::Duration};

use polydev_tests::{
    client::shell,
    docker,
    nomad::Nomad,
    process::{Process, output},
    program,
    shim::Shim,
    wait_until,
};

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
            agent.exit().ok_or_else(|| "still running".to_owned())
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
        // That of NVIDIA's devices, which this Docker does not have.
        (
            "runtime",
            "image = \"polydev-busybox:1\"\n runtime = \"nvidia\"",
            "nvidia",
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
        nomad.run(&["job", "run", "-detach", file.to_str().expect("valid UTF-8")]);
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
