//! Nomad accepts the jobs of `jobspecs/`, and the images' copies are the same.

use std::{fs, time::Duration};

use polydev_tests::{
    job,
    nomad::{Nomad, nomad_program},
    process::succeed,
    root, wait_until,
};

const PROVIDERS: [&str; 3] = ["openai", "anthropic", "google"];
const KINDS: [&str; 2] = ["pool", "on-demand"];

#[test]
fn jobspecs_are_formatted_and_valid() {
    succeed(
        std::process::Command::new(nomad_program())
            .args(["fmt", "-check"])
            .arg("-recursive")
            .arg(root().join("jobspecs")),
    );
    let nomad = Nomad::start();
    for provider in PROVIDERS.into_iter().chain(["python"]) {
        for kind in KINDS {
            let file = format!("jobspecs/{kind}-{provider}.nomad.hcl");
            let told = nomad.run(&["job", "validate", &file]);
            assert!(told.contains("Job validation successful"), "{told}");
            assert!(!told.contains("Warning"), "{told}");
        }
        let file = format!("jobspecs/pool-{provider}.nomad.hcl");
        let empty = nomad.run(&["job", "validate", "-var", "count=0", &file]);
        assert!(empty.contains("Job validation successful"), "{empty}");
    }
}

#[test]
fn jobspecs_of_all_clis_say_the_same() {
    for kind in KINDS {
        let of = |provider: &str| {
            let path = root().join(format!("jobspecs/{kind}-{provider}.nomad.hcl"));
            fs::read_to_string(path)
                .unwrap()
                .replace(provider, "PROVIDER")
        };
        let [first, rest @ ..] = PROVIDERS.map(of);
        assert!(rest.iter().all(|other| *other == first), "{kind}");
    }
}

#[test]
fn what_the_images_share_is_the_same_in_each() {
    for file in ["entrypoint.sh", ".dockerignore", "extra-ca/README.md"] {
        let of = |provider: &str| {
            fs::read(root().join(format!("containers/{provider}-runtime/{file}"))).unwrap()
        };
        let [first, rest @ ..] = PROVIDERS.map(of);
        assert!(rest.iter().all(|other| *other == first), "{file}");
    }
}

/// The examples of the documentation do what the documentation says.
#[test]
fn the_examples_run_as_they_are() {
    let nomad = Nomad::start();
    let submit = |name: &str| {
        let file = format!("jobspecs/examples/{name}.nomad.hcl");
        nomad.run(&["job", "run", "-detach", &file]);
    };
    submit("batch");
    let alloc = nomad.wait_dead("example-batch");
    let text = String::from_utf8(nomad.logs(job::id(&alloc), "stdout")).unwrap();
    assert_eq!(text, "running as user in dc1\n");
    assert_eq!(nomad.logs(job::id(&alloc), "stderr"), b"a warning\n");

    submit("service");
    let id = nomad.wait_started("example-service");
    wait_until("a passing check", Duration::from_secs(30), || {
        let checks = nomad.get(&format!("/v1/client/allocation/{id}/checks"));
        let mut all = checks.as_object().into_iter().flatten();
        if all.any(|(_, check)| check["Status"] == "success") {
            Ok(())
        } else {
            Err(checks.to_string())
        }
    });

    submit("group");
    let id = nomad.wait_started("example-group");
    let logs =
        format!("/v1/client/fs/logs/{id}?task=neighbour&type=stdout&plain=true&origin=start");
    wait_until("the neighbour", Duration::from_secs(30), || {
        let text = nomad.get_raw(&logs);
        if text == b"hello\n" {
            Ok(())
        } else {
            Err(format!("{text:?}"))
        }
    });

    submit("limits");
    let id = nomad.wait_started("example-limits");
    // Not `ulimit -Sn`: under load, runc 1.1 starts some `exec`s with the hard limit as the soft.
    let script = "awk '/open files/ { print $4, $5 }' /proc/1/limits; ls -d /data /dev/hole";
    let seen = nomad.exec(&id, &["sh", "-c", script], false, b"");
    assert_eq!(seen.stdout, "1024 2048\n/data\n/dev/hole\n");
}
