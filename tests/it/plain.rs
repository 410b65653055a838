//! Plain tasks under a real Nomad agent: life, output, exec, recovery.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use polydev_tests::{
    docker,
    job::{self, batch, events, merge, service, shell},
    nomad::Nomad,
    process::output,
    shim::instance_label,
    wait_until,
};
use serde_json::json;

#[test]
fn a_batch_job_runs_and_leaves_its_output_and_nothing_else() {
    let nomad = Nomad::start();
    nomad.submit(&batch(
        "hello",
        shell("echo out; echo err >&2; env; exit 7"),
    ));
    let alloc = nomad.wait_dead("hello");
    let id = job::id(&alloc);
    assert!(
        events(&alloc).contains("Exit Code: 7"),
        "{}",
        events(&alloc)
    );
    let stdout = String::from_utf8(nomad.logs(id, "stdout")).unwrap();
    assert!(stdout.starts_with("out\n"), "{stdout}");
    for variable in [
        "NOMAD_ALLOC_DIR=/alloc",
        "NOMAD_TASK_DIR=/local",
        "NOMAD_SECRETS_DIR=/secrets",
    ] {
        assert!(stdout.contains(variable), "{stdout}");
    }
    assert_eq!(nomad.logs(id, "stderr"), b"err\n");
    let label = instance_label(&nomad.state_dir());
    assert_eq!(docker::containers(&label), Vec::<String>::new());
    let journal = std::fs::read_dir(nomad.state_dir().join("tasks")).unwrap();
    assert_eq!(journal.count(), 0);
}

#[test]
fn stop_sends_the_kill_signal_and_kills_after_the_timeout() {
    let nomad = Nomad::start();
    let mut polite = service(
        "polite",
        shell("trap 'echo bye; exit 3' USR1; echo ready; while :; do sleep 0.05; done"),
    );
    job::task(&mut polite)["KillSignal"] = "SIGUSR1".into();
    let mut deaf = service(
        "deaf",
        shell("trap '' TERM; echo ready; while :; do sleep 0.05; done"),
    );
    job::task(&mut deaf)["KillTimeout"] = json!(2_000_000_000_u64);
    for (id, job) in [("polite", polite), ("deaf", deaf)] {
        nomad.submit(&job);
        let alloc = nomad.wait_started(id);
        wait_until("its first line", Duration::from_secs(20), || {
            let text = nomad.logs(&alloc, "stdout");
            if text == b"ready\n" {
                Ok(())
            } else {
                Err(format!("{text:?}"))
            }
        });
        let asked = Instant::now();
        nomad.run(&["job", "stop", "-detach", "-yes", id]);
        let alloc = nomad.wait_dead(id);
        if id == "deaf" {
            assert!(asked.elapsed() >= Duration::from_secs(2), "no time to end");
        }
        let told = events(&alloc);
        let expected = if id == "polite" {
            "Exit Code: 3"
        } else {
            "Exit Code: 137, Signal: 9"
        };
        assert!(told.contains(expected), "{told}");
    }
}

#[test]
fn exec_and_signals_reach_the_task() {
    let nomad = Nomad::start();
    nomad.submit(&service(
        "open",
        shell("trap 'echo hup' HUP; while :; do sleep 0.05; done"),
    ));
    let id = nomad.wait_started("open");
    let exec = |args: &[&str]| {
        output(
            &mut nomad.command(&[&["alloc", "exec", "-t=false", "-i=false", &id], args].concat()),
        )
    };
    let done = exec(&[
        "sh",
        "-c",
        "echo hello stdout; echo hello stderr >&2; exit 43",
    ]);
    assert_eq!(done.status.code(), Some(43));
    assert_eq!(String::from_utf8_lossy(&done.stdout), "hello stdout\n");
    assert_eq!(String::from_utf8_lossy(&done.stderr), "hello stderr\n");
    nomad.run(&["alloc", "signal", "-s", "SIGHUP", &id]);
    wait_until("the trap", Duration::from_secs(10), || {
        let text = nomad.logs(&id, "stdout");
        if text == b"hup\n" {
            Ok(())
        } else {
            Err(format!("{text:?}"))
        }
    });
    let unknown = output(&mut nomad.command(&["alloc", "signal", "-s", "SIGNOT", &id]));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("SIGNOT"));
}

#[test]
fn a_killed_driver_loses_neither_tasks_nor_lines_nor_the_exit_status() {
    let mut nomad = Nomad::start();
    nomad.submit(&batch(
        "counts",
        shell("i=0; while [ $i -lt 400 ]; do i=$((i+1)); echo $i; sleep 0.02; done; exit 5"),
    ));
    let id = nomad.wait_started("counts");
    for life in 1..=3 {
        let holder = std::fs::read_to_string(nomad.state_dir().join("driver.lock")).unwrap();
        let pid = nix::unistd::Pid::from_raw(holder.trim().parse().unwrap());
        nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
        wait_until(
            "another driver that has the task",
            Duration::from_secs(30),
            || {
                let log = nomad.agent().log();
                // Nomad may give up a task whose driver dies while it is being recovered.
                let count = log.matches("Nomad waits for the task's end").count();
                if count == life + 1 {
                    Ok(())
                } else {
                    Err(format!("{count} of {life}"))
                }
            },
        );
    }
    let alloc = nomad.wait_dead("counts");
    assert!(
        events(&alloc).contains("Exit Code: 5"),
        "{}",
        events(&alloc)
    );
    let lines: String = (1..=400).map(|line| format!("{line}\n")).collect();
    assert_eq!(String::from_utf8(nomad.logs(&id, "stdout")).unwrap(), lines);
    assert_eq!(
        nomad.allocations("counts").len(),
        1,
        "nothing was started twice"
    );
}

/// A crashed agent that cannot attach to its driver again starts another driver. The new driver
/// takes over the node and its tasks.
#[test]
fn a_second_driver_takes_over_from_one_whose_agent_is_gone() {
    let mut nomad = Nomad::start_lasting();
    nomad.submit(&service("goes-on", shell("while :; do sleep 1; done")));
    let id = nomad.wait_started("goes-on");
    let lock = nomad.state_dir().join("driver.lock");
    let holder = || std::fs::read_to_string(&lock).unwrap();
    let first = holder();
    nix::sys::signal::kill(nomad.agent().pid(), Signal::SIGKILL).unwrap();
    nomad.forget_plugin();
    nomad.restart();
    assert_ne!(holder(), first, "the first driver has left");
    assert_eq!(nomad.wait_started("goes-on"), id);
    assert_eq!(nomad.exec(&id, &["echo", "hi"], false, b"").stdout, "hi\n");
    assert_eq!(
        docker::containers(&instance_label(&nomad.state_dir())).len(),
        1
    );
}

/// Docker and the kernel show the container with the settings of its job.
#[test]
fn options_and_resources_are_what_docker_and_the_kernel_see() {
    let nomad = Nomad::start_with(
        "pids_limit = 200\n no_new_privileges = true\n extra_labels = [\"job_name\", \"task*\"]",
    );
    let mut config = shell("sleep 1000");
    merge(
        &mut config,
        json!({
            "cap_drop": ["chown"], "readonly_rootfs": true, "hostname": "box", "work_dir": "/tmp",
            "ulimit": [{ "nofile": "100:200" }], "sysctl": [{ "net.core.somaxconn": "99" }],
            "shm_size": 1_000_000, "group_add": ["4242"], "labels": [{ "own": "label" }],
            "mount": [{ "type": "tmpfs", "target": "/scratch", "tmpfs_options": { "size": 100_000 } }],
            "volumes": ["local/data:/data"], "devices": [{ "host_path": "/dev/null", "container_path": "/dev/hole" }],
            "cpu_hard_limit": true, "pids_limit": 50, "healthchecks": { "disable": true },
        }),
    );
    let mut job = service("seen", config);
    job::task(&mut job)["User"] = "user".into();
    nomad.submit(&job);
    let id = nomad.wait_started("seen");
    let ids = docker::containers(&format!("dev.polydev.alloc_id={id}"));
    let seen = docker::inspect(&ids[0]);
    let host = &seen["HostConfig"];
    assert_eq!(host["CapDrop"], json!(["CHOWN", "NET_RAW"]));
    assert_eq!(host["SecurityOpt"], json!(["no-new-privileges=true"]));
    assert_eq!(
        (&host["Memory"], &host["MemorySwap"]),
        (&json!(64 << 20), &json!(64 << 20))
    );
    let ulimits = json!([{ "Name": "nofile", "Soft": 100, "Hard": 200 }]);
    assert_eq!(host["Ulimits"], ulimits);
    assert_eq!(host["CpuShares"], 100);
    assert!(host["CpuQuota"].as_i64() > Some(0), "no hard limit");
    assert_eq!(host["ShmSize"], 1_000_000);
    assert_eq!(host["PidsLimit"], 50);
    assert_eq!(seen["Config"]["Healthcheck"]["Test"], json!(["NONE"]));
    let labels = &seen["Config"]["Labels"];
    assert_eq!(labels["own"], "label");
    assert_eq!(labels["com.hashicorp.nomad.job_name"], "seen");
    assert_eq!(labels["com.hashicorp.nomad.task_group_name"], "group");
    // The limits of process 1: an exec of Docker 20.10 raised its own soft limit to the hard one.
    let script = "id -un; id -G; hostname; pwd; awk '/open files/ { print $4; print $5 }' /proc/1/limits; cat /proc/sys/net/core/somaxconn; \
        touch /x 2>/dev/null || echo read-only; ls -d /data /alloc /local /secrets /dev/hole; \
        grep NoNewPrivs /proc/self/status; ps -o pid,args | grep '^ *1 '; touch /alloc/logs/x 2>/dev/null || echo logs are ours; \
        grep /scratch /proc/mounts | grep -o 'size=[0-9]*k'";
    let told = nomad.exec(&id, &["sh", "-c", script], false, b"").stdout;
    let expected = "user\n1000 4242\nbox\n/tmp\n100\n200\n99\nread-only\n/alloc\n/data\n/dev/hole\n/local\n/secrets\n\
        NoNewPrivs:\t1\n    1 /.polydev/init /.polydev/link/init.sock\nlogs are ours\nsize=100k\n";
    assert_eq!(told, expected);
    // CPU and memory figures do not need dockerd.
    wait_until("figures", Duration::from_secs(10), || {
        let usage = nomad.get(&format!("/v1/client/allocation/{id}/stats"))["Tasks"]["task"]["ResourceUsage"].clone();
        if usage["MemoryStats"]["RSS"].as_u64() > Some(0) {
            Ok(())
        } else {
            Err(usage.to_string())
        }
    });
}

/// A task or a child process that uses too much memory is killed, and the task's event says so.
#[test]
fn out_of_memory_is_told_as_such() {
    let nomad = Nomad::start();
    let eat = "head -c 200000000 /dev/zero | tail";
    for (id, script, code) in [
        ("main", format!("exec sh -c '{eat}'"), "137"),
        ("child", format!("sh -c '{eat}'; exit 3"), "3"),
    ] {
        nomad.submit(&batch(id, shell(&script)));
        let alloc = nomad.wait_dead(id);
        let told = events(&alloc);
        assert!(told.contains("Out of memory"), "{told}");
        let all = alloc["TaskStates"]["task"]["Events"].as_array().unwrap();
        let end = all
            .iter()
            .find(|event| event["Type"] == "Terminated")
            .unwrap();
        assert_eq!(end["Details"]["oom_killed"], "true", "{end}");
        assert_eq!(end["Details"]["exit_code"], code, "{end}");
    }
}
