//! Rare cases of plain tasks. Most are from the upstream tests of Nomad's Docker driver
//! (`tests/BEHAVIOURS.md`).

use std::{fs, process::Command, time::Duration};

use polydev_driver::limits::{Handle, Limits};
use polydev_tests::{
    docker,
    job::{self, IMAGE, batch, events, merge, service, shell, task},
    nomad::Nomad,
    process::output,
    wait_until,
};
use serde_json::{Value, json};

fn with(script: &str, options: Value) -> Value {
    let mut config = shell(script);
    merge(&mut config, options);
    config
}

/// The one container of an allocation.
fn container(alloc: &str) -> String {
    let ids = docker::containers(&format!("dev.polydev.alloc_id={alloc}"));
    assert_eq!(ids.len(), 1, "{ids:?}");
    ids[0].clone()
}

const FOREVER: &str = "while :; do sleep 1; done";

/// C015, C078 and an image that must be pulled: the start fails, and the error says why.
#[test]
fn starts_that_fail_say_why() {
    let nomad = Nomad::start();
    // Nothing listens at the registry's address, so a pull from there fails.
    let here = ["127.0.0.1:9/here:1", "127.0.0.1:9/here:latest"];
    for name in here {
        docker::docker(&["tag", IMAGE, name]);
    }
    let mut unknown_user = batch("user", shell("true"));
    task(&mut unknown_user)["User"] = "nobody-here".into();
    for (id, job, words) in [
        ("user", unknown_user, "nobody-here"),
        (
            "fork",
            batch(
                "fork",
                with("ls | cat", json!({ "init": false, "pids_limit": 1 })),
            ),
            "Exit Code: 2",
        ),
        // dockerd's own error shows that dockerd got the option, whatever the disk supports.
        (
            "storage",
            batch(
                "storage",
                with("true", json!({ "storage_opt": { "no_such": "1" } })),
            ),
            "option",
        ),
        (
            "present",
            batch("present", with("true", json!({ "image": here[0] }))),
            "Exit Code: 0",
        ),
        (
            "forced",
            batch(
                "forced",
                with("true", json!({ "image": here[0], "force_pull": true })),
            ),
            "cannot pull image",
        ),
        (
            "latest",
            batch("latest", with("true", json!({ "image": here[1] }))),
            "cannot pull image",
        ),
    ] {
        nomad.submit(&job);
        let told = events(&nomad.wait_dead(id));
        assert!(told.contains(words), "{id}: {told}");
    }
    for name in here {
        docker::docker(&["rmi", name]);
    }
}

/// C013: somebody removes the container. The task has ended, and Nomad shows that.
#[test]
fn a_container_removed_by_somebody_else_ends_its_task() {
    let nomad = Nomad::start();
    for (id, init) in [("with-init", true), ("without-init", false)] {
        nomad.submit(&batch(id, with(FOREVER, json!({ "init": init }))));
        let alloc = nomad.wait_started(id);
        docker::docker(&["rm", "--force", &container(&alloc)]);
        let told = events(&nomad.wait_dead(id));
        assert!(told.contains("Exit Code: 137"), "{id}: {told}");
    }
    let journal = fs::read_dir(nomad.state_dir().join("tasks")).unwrap();
    assert_eq!(journal.count(), 0);
}

/// Every limit of a live container can be raised and lowered, the bandwidth too.
#[test]
fn limits_are_raised_and_lowered_on_a_live_container() {
    let limits = [
        "--memory=256m",
        "--memory-swap=256m",
        "--pids-limit=64",
        "--cpus=0.1",
    ];
    let id =
        docker::docker(&[&["run", "--detach"], &limits[..], &[IMAGE, "sleep", "1000"]].concat());
    let id = id.trim();
    let pid = docker::inspect(id)["State"]["Pid"].as_u64().unwrap();
    let handle = Handle::open(u32::try_from(pid).unwrap(), &Limits::IDLE).unwrap();
    // The driver lowers limits before a command starts, and raises limits while it starts.
    let slower = Limits {
        mbits: Limits::IDLE.mbits - 1,
        ..Limits::RUN
    };
    assert!(handle.is_lowered_by(&slower) && !handle.is_lowered_by(&Limits::RUN));
    let inside =
        |file: &str| docker::docker(&["exec", id, "cat", &format!("/sys/fs/cgroup/{file}")]);
    for class in [Limits::RUN, Limits::IDLE, Limits::RUN, Limits::IDLE] {
        handle.set(&class).unwrap();
        handle.shaping(&class)().unwrap();
        let seen = if polydev_driver::limits::cgroup_version() == 2 {
            ["memory.max", "pids.max"].map(inside)
        } else {
            ["memory/memory.memsw.limit_in_bytes", "pids/pids.max"].map(inside)
        };
        assert_eq!(
            seen.map(|value| value.trim().to_owned()),
            [class.memory_bytes().to_string(), class.pids.to_string()]
        );
        let mut tc = Command::new("nsenter");
        tc.args([
            "--target",
            &pid.to_string(),
            "--net",
            "tc",
            "qdisc",
            "show",
            "dev",
            "eth0",
        ]);
        let bucket = String::from_utf8(output(&mut tc).stdout).unwrap();
        assert!(
            bucket.contains(&format!("rate {}Mbit", class.mbits)),
            "{bucket}"
        );
    }
    docker::docker(&["rm", "--force", id]);
}

/// Cases that take more than half a minute each: `make test-long`.
mod long {
    use super::*;

    /// C055, C115 and C132: output that Nomad does not collect, or that nobody can read back.
    #[test]
    fn output_that_is_not_collected_is_dockers_alone() {
        let nomad = Nomad::start_with("disable_log_collection = true");
        nomad.submit(&service(
            "docker",
            with("echo for docker; exec sleep 1000", json!({})),
        ));
        let alloc = nomad.wait_started("docker");
        wait_until("the line", Duration::from_secs(10), || {
            let logged = docker::docker(&["logs", &container(&alloc)]);
            if logged == "for docker\n" {
                Ok(())
            } else {
                Err(logged)
            }
        });
        assert_eq!(nomad.logs(&alloc, "stdout"), b"");
        assert!(
            nomad.log_readers().is_empty(),
            "Nomad was told not to collect"
        );

        let nomad = Nomad::start();
        let unreadable = with(
            "echo gone; exit 4",
            json!({ "logging": { "type": "none" } }),
        );
        nomad.submit(&batch("none", unreadable));
        let ended = nomad.wait_dead("none");
        assert!(
            events(&ended).contains("Exit Code: 4"),
            "{}",
            events(&ended)
        );
        assert_eq!(nomad.logs(job::id(&ended), "stdout"), b"");
    }

    /// C180: the driver call of a script check, with a command that takes too long.
    #[test]
    fn a_script_that_hangs_is_ended_at_its_timeout() {
        let nomad = Nomad::start();
        let mut job = service("checked", shell(FOREVER));
        task(&mut job)["Templates"] = json!([{
            "EmbeddedTmpl": "{{ with nomadVar \"nomad/jobs/checked\" }}{{ .value }}{{ end }}",
            "DestPath": "local/value", "ChangeMode": "script",
            "ChangeScript": {
                "Command": "/bin/sh", "Args": ["-c", "echo $$ >/alloc/script; exec sleep 1000"],
                "Timeout": 1_000_000_000_u64, "FailOnError": false,
            },
        }]);
        let variable = |value: &str| {
            let variable = json!({ "Path": "nomad/jobs/checked", "Items": { "value": value } });
            nomad.put("/v1/var/nomad/jobs/checked", &variable)
        };
        variable("one");
        nomad.submit(&job);
        let id = nomad.wait_started("checked");
        variable("two");
        let script = "[ -e /alloc/script ] && ! kill -0 $(cat /alloc/script)";
        wait_until(
            "the script's end",
            Duration::from_secs(30),
            || match nomad.exec(&id, &["sh", "-c", script], false, b"") {
                ended if ended.exit_code == 0 => Ok(()),
                running => Err(format!("{running:?}")),
            },
        );
        assert_eq!(nomad.wait_started("checked"), id, "the task goes on");
    }

    /// C088, C089: names in a user-defined network, and the host's network.
    #[test]
    fn networks_by_name_and_the_hosts_own() {
        let nomad = Nomad::start();
        let network = format!("pdtest{:08x}", rand::random::<u32>());
        docker::docker(&["network", "create", &network]);
        let server =
            "mkdir /tmp/www; echo hello >/tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www";
        let mut serves = service(
            "server",
            with(
                server,
                json!({ "network_mode": network, "network_aliases": ["db"] }),
            ),
        );
        task(&mut serves)["Services"] = json!([{ "Name": "db", "Provider": "nomad" }]);
        nomad.submit(&serves);
        let alloc = nomad.wait_started("server");
        // Other containers in the network use the address of the container there.
        let own =
        docker::inspect(&container(&alloc))["NetworkSettings"]["Networks"][&network]["IPAddress"]
            .clone();
        wait_until("the service", Duration::from_secs(20), || {
            let told = nomad.get("/v1/service/db");
            if told[0]["Address"] == own {
                Ok(())
            } else {
                Err(format!("{told}, not {own}"))
            }
        });
        let client = "until wget -qO- http://db:8080/; do sleep 0.1; done";
        nomad.submit(&batch(
            "client",
            with(client, json!({ "network_mode": network })),
        ));
        let ended = nomad.wait_dead("client");
        assert_eq!(
            nomad.logs(job::id(&ended), "stdout"),
            b"hello\n",
            "{}",
            events(&ended)
        );

        nomad.submit(&service(
            "host",
            with(FOREVER, json!({ "network_mode": "host" })),
        ));
        let alloc = nomad.wait_started("host");
        let seen = nomad
            .exec(&alloc, &["readlink", "/proc/self/ns/net"], false, b"")
            .stdout;
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        assert_eq!(seen.trim(), own.to_str().unwrap());
        for job in ["server", "host"] {
            nomad.run(&["job", "stop", "-detach", "-yes", job]);
            nomad.wait_dead(job);
        }
        docker::docker(&["network", "rm", &network]);
    }

    /// C005: the archive is in the task's folder before the task starts.
    #[test]
    fn an_image_is_loaded_from_the_tasks_own_archive() {
        let nomad = Nomad::start();
        let name = format!("polydev-test-load-{:08x}:1", rand::random::<u32>());
        let mut job = batch(
            "load",
            with("echo loaded", json!({ "image": name, "load": "image.tar" })),
        );
        let mut before = job["TaskGroups"][0]["Tasks"][0].clone();
        before["Name"] = "before".into();
        before["Lifecycle"] = json!({ "Hook": "prestart" });
        before["Config"] = with(
            "until [ -e /alloc/go ]; do sleep 0.05; done",
            json!({ "image": IMAGE }),
        );
        job["TaskGroups"][0]["Tasks"]
            .as_array_mut()
            .unwrap()
            .push(before);
        nomad.submit(&job);
        let alloc = wait_until("the task before", Duration::from_secs(60), || {
            let all = nomad.allocations("load");
            let runs = |alloc: &&Value| alloc["TaskStates"]["before"]["State"] == "running";
            let alloc = all.iter().find(runs).ok_or_else(|| format!("{all:?}"))?;
            Ok(job::id(alloc).to_owned())
        });
        let folder = nomad.folder().join("data/alloc").join(&alloc);
        docker::docker(&["tag", IMAGE, &name]);
        let archive = folder.join("task/local/image.tar");
        fs::create_dir_all(archive.parent().unwrap()).unwrap();
        docker::docker(&["save", "--output", archive.to_str().unwrap(), &name]);
        docker::docker(&["rmi", &name]);
        fs::write(folder.join("alloc/go"), "").unwrap();
        let told = events(&nomad.wait_dead("load"));
        assert!(told.contains("Exit Code: 0"), "{told}");
        assert_eq!(nomad.logs(&alloc, "stdout"), b"loaded\n");
        docker::docker(&["rmi", &name]);
    }
}
