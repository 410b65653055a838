//! What users bring that job files with both drivers do not show.

use std::time::Duration;

use polydev_tests::{
    client::shell as run_shell,
    docker,
    job::{self, batch, events, merge, service, shell},
    nomad::Nomad,
    shim::Shim,
    wait_until,
};
use serde_json::{Value, json};

/// The one container of an allocation's task, as Docker shows it.
fn container(alloc: &str) -> Value {
    let ids = docker::containers(&format!("dev.polydev.alloc_id={alloc}"));
    docker::inspect(&ids[0])
}

/// A `network` block as jobs had it in their tasks.
fn with_mbits(mut job: Value) -> Value {
    job::task(&mut job)["Resources"]["Networks"] =
        json!([{ "MBits": 10, "DynamicPorts": [{ "Label": "http" }] }]);
    job
}

#[test]
fn mbits_of_an_older_job_limit_only_where_the_operator_wants_it() {
    for (options, expected) in [
        ("", ""),
        (
            "enforce_mbits = true",
            "Driver: Limited to 10 Mbit/s by `mbits` of its network, as the plugin's `enforce_mbits` says\n",
        ),
    ] {
        let nomad = Nomad::start_with(options);
        nomad.submit(&with_mbits(service("old", shell("exec sleep 600"))));
        let alloc = nomad.wait_started("old");
        let told = wait_until("the task's events", Duration::from_secs(20), || {
            let told = events(&nomad.get(&format!("/v1/allocation/{alloc}")));
            let is_there = told.contains("Started") && told.contains(expected);
            if is_there { Ok(told) } else { Err(told) }
        });
        assert_eq!(told.contains("Mbit/s"), !expected.is_empty(), "{told}");

        let mut config = shell("echo runs");
        merge(&mut config, json!({ "network_mode": "host" }));
        nomad.submit(&with_mbits(batch("host", config)));
        let ended = nomad.wait_dead("host");
        assert_eq!(nomad.logs(job::id(&ended), "stdout"), b"runs\n");
        let says = events(&ended).contains("`mbits` of its network has no effect");
        assert_eq!(says, !expected.is_empty(), "{}", events(&ended));
    }
}

#[test]
fn a_task_is_told_that_the_one_whose_network_it_shares_has_started_again() {
    let nomad = Nomad::start();
    let mut job = service("vpn", shell("exec sleep 600"));
    let group = &mut job["TaskGroups"][0];
    group["RestartPolicy"] =
        json!({ "Attempts": 3, "Interval": 60_000_000_000_u64, "Delay": 0, "Mode": "fail" });
    let mut front = group["Tasks"][0].clone();
    front["Name"] = "front".into();
    front["Lifecycle"] = json!({ "Hook": "prestart", "Sidecar": true });
    front["RestartPolicy"] = group["RestartPolicy"].clone();
    merge(
        &mut group["Tasks"][0]["Config"],
        json!({ "network_mode": "task:front" }),
    );
    group["Tasks"] = json!([front, group["Tasks"][0]]);
    nomad.submit(&job);
    let alloc = nomad.wait_started("vpn");
    nomad.run(&["alloc", "restart", "-task", "front", &alloc]);
    let expected = format!(
        "Task `front` was started again, and this task still has its earlier network: \
         restart this task (nomad alloc restart {alloc} task)"
    );
    wait_until("the event", Duration::from_secs(30), || {
        let told = events(&nomad.get(&format!("/v1/allocation/{alloc}")));
        if told.contains(&expected) {
            Ok(())
        } else {
            Err(told)
        }
    });
    nomad.run(&["alloc", "restart", "-task", "task", &alloc]);
    wait_until("the new network", Duration::from_secs(30), || {
        let told = nomad.get(&format!("/v1/allocation/{alloc}"));
        let is_running = told["TaskStates"]["task"]["State"] == "running"
            && told["TaskStates"]["task"]["Restarts"] == 1;
        if is_running {
            Ok(())
        } else {
            Err(told["TaskStates"].to_string())
        }
    });
    let address = |task: &str| {
        let show = ["ip", "-o", "-4", "addr", "show", "eth0"];
        nomad.run(
            &[
                &[
                    "alloc", "exec", "-i=false", "-t=false", "-task", task, &alloc,
                ],
                &show[..],
            ]
            .concat(),
        )
    };
    assert_eq!(address("front"), address("task"));
}

#[test]
fn the_operator_says_who_gets_the_output_of_plain_tasks() {
    for (path, of_docker) in [("direct", ""), ("docker", "1\n2\n"), ("both", "1\n2\n")] {
        let nomad = Nomad::start_with(&format!("log_path = \"{path}\""));
        nomad.submit(&service("lines", shell("echo 1; echo 2; exec sleep 600")));
        let alloc = nomad.wait_started("lines");
        wait_until("Nomad's lines", Duration::from_secs(20), || {
            let text = String::from_utf8_lossy(&nomad.logs(&alloc, "stdout")).into_owned();
            if text == "1\n2\n" { Ok(()) } else { Err(text) }
        });
        let id = container(&alloc)["Id"].as_str().unwrap().to_owned();
        wait_until("Docker's lines", Duration::from_secs(20), || {
            let text = docker::docker(&["logs", &id]);
            if text == of_docker {
                Ok(())
            } else {
                Err(format!("{path}: {text}"))
            }
        });
    }
}

#[test]
fn a_task_has_the_address_and_the_volume_that_its_job_names() {
    let network = format!("pdtest-{:08x}", rand::random::<u32>());
    let octet = 16 + rand::random::<u8>() % 100;
    let subnet = format!("10.213.{octet}.0/24");
    docker::docker(&["network", "create", "--subnet", &subnet, &network]);
    let nomad = Nomad::start_with("volumes {\n enabled = true\n}");
    let mut config = shell("echo kept >/data/file; exec sleep 600");
    let volume = format!("{network}-data");
    merge(
        &mut config,
        json!({
            "network_mode": network, "ipv4_address": format!("10.213.{octet}.77"),
            "volume_driver": "local", "volumes": [format!("{volume}:/data")],
        }),
    );
    nomad.submit(&service("placed", config));
    let alloc = nomad.wait_started("placed");
    let seen = container(&alloc);
    let address = &seen["NetworkSettings"]["Networks"][&network]["IPAddress"];
    assert_eq!(*address, format!("10.213.{octet}.77"));
    let mounts = seen["Mounts"].as_array().unwrap();
    let mount = mounts
        .iter()
        .find(|mount| mount["Name"] == *volume)
        .unwrap();
    assert_eq!(mount["Destination"], "/data");
    nomad.run(&["job", "stop", "-detach", "-yes", "-purge", "placed"]);
    docker::wait_containers(&format!("dev.polydev.alloc_id={alloc}"), 0);
    docker::docker(&["volume", "rm", &volume]);
    docker::docker(&["network", "rm", &network]);
}

#[test]
fn an_early_end_under_no_new_privileges_names_the_option() {
    let nomad = Nomad::start_with("no_new_privileges = true\n allow_privileged = true");
    let fails = || shell("exit 1");
    nomad.submit(&batch("held", fails()));
    let told = events(&nomad.wait_dead("held"));
    assert!(
        told.contains("the plugin sets `no_new_privileges`"),
        "{told}"
    );
    for free in [
        json!({ "privileged": true }),
        json!({ "security_opt": ["no-new-privileges=false"] }),
    ] {
        let mut config = fails();
        merge(&mut config, free);
        nomad.submit(&batch("free", config));
        let told = events(&nomad.wait_dead("free"));
        assert!(!told.contains("no_new_privileges"), "{told}");
        nomad.run(&["job", "stop", "-detach", "-yes", "-purge", "free"]);
    }
}

#[test]
fn a_task_whose_group_has_ports_that_do_not_lead_to_it_is_told() {
    let nomad = Nomad::start();
    let mut job = batch("unreached", shell("true"));
    job["TaskGroups"][0]["Networks"] = json!([{ "DynamicPorts": [{ "Label": "http" }] }]);
    nomad.submit(&job);
    let told = events(&nomad.wait_dead("unreached"));
    assert!(
        told.contains(
            "The group's network has the ports http, and none of them leads to this task"
        ),
        "{told}"
    );
}

#[test]
fn the_home_of_a_slot_can_be_written_to_whatever_its_image_says() {
    let script = "mkdir /app && echo of the image >/app/file && useradd -m -u 1500 app && \
        chmod -R a+rX /runtime";
    let base = "polydev-anthropic-runtime:latest";
    for (image, home) in [
        ("polydev-home:1", "ENV HOME=/app"),
        ("polydev-home:2", "ENV HOME="),
    ] {
        super::make(image, base, script, &["USER 1500", home]);
    }
    for image in ["polydev-home:1", "polydev-home:2"] {
        let nomad = Nomad::start();
        let shim = Shim::serve(&nomad.address);
        nomad.submit_pool_with("anthropic", 1, &format!("image={image}"));
        let client = shim.client();
        client.wait_idle("anthropic", 1);
        let script = "echo $HOME; touch $HOME/x && echo written; cat /app/file";
        let outcome = client.run(run_shell("anthropic", script)).unwrap();
        let expected = "/home/runtime\nwritten\nof the image\n";
        assert_eq!(outcome.stdout(), expected, "{image}: {}", outcome.stderr());
    }
}
