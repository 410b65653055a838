//! What a caller sees of a run, with the embedded engine.

use std::{process::Command, time::Duration};

use bytes::Bytes;
use polydev_proto::runtime::{ExitReason, RunStart, run_event::Event, run_input::Input};
use polydev_stand_in::Text;
use polydev_tests::{
    client::{argv, prompt, shell},
    docker, fresh_key,
    host::Host,
    process::output,
    shim::Shim,
    wait_until,
};

#[test]
fn a_command_gets_its_streams_status_and_timeline() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let outcome = client
        .run(shell("anthropic", "echo out; echo err >&2; exit 3"))
        .unwrap();
    assert_eq!(
        (outcome.stdout().as_str(), outcome.stderr().as_str()),
        ("out\n", "err\n")
    );
    assert_eq!(outcome.exited.reason(), ExitReason::Exited);
    assert_eq!(outcome.exited.exit_code, 3);
    assert!(outcome.exited.warm && outcome.accepted.warm);

    let stages: Vec<&str> = outcome
        .exited
        .timeline
        .iter()
        .map(|stage| &*stage.name)
        .collect();
    let expected = [
        "received",
        "claimed",
        "granted",
        "limits_raised",
        "started",
        "first_output",
        "exited",
    ];
    assert_eq!(stages, expected);
    let times: Vec<_> = outcome
        .exited
        .timeline
        .iter()
        .map(|stage| stage.at.unwrap())
        .collect();
    assert!(
        times.is_sorted_by_key(|at| (at.seconds, at.nanos)),
        "{times:?}"
    );
}

#[test]
fn a_container_serves_one_run_and_the_slot_is_warm_again() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let host = |start: RunStart| client.run(start).unwrap();
    let first = host(shell("anthropic", "hostname; echo left >/tmp/left"));
    let second = host(shell("anthropic", "hostname; ls /tmp"));
    assert_eq!(first.accepted.slot_id, second.accepted.slot_id);
    assert_eq!(second.accepted.generation, first.accepted.generation + 1);
    assert_ne!(first.stdout(), second.stdout());
    assert_eq!(
        second.stdout().lines().count(),
        1,
        "the second run sees what the first left"
    );

    client.wait_idle("anthropic", 1);
    docker::wait_containers(&shim.label(), 1);
}

#[test]
fn a_runs_container_is_hardened() {
    let shim = Shim::dev(&["openai=1"]);
    let client = shim.client();
    let script = r#"
        id -u; id -g
        grep -E '^(SigBlk|CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\t'
        touch /runtime/x /etc/x /x 2>/dev/null || echo read-only
        touch ~/x /tmp/x /run/x && echo writable
        (cat /proc/1/environ || ls /proc/1/fd || ls /proc/1/cwd) 2>/dev/null || echo init-is-closed
        ls /proc/self/fd | tr '\n' ' '; echo
        stat -c %a ~
        ls /var/run/docker.sock 2>/dev/null || echo no-docker
        cat /proc/self/oom_score_adj
        cat /proc/1/oom_score_adj
    "#;
    let outcome = client.run(shell("openai", script)).unwrap();
    let expected = "1000\n1000\nSigBlk:0000000000000000\nCapEff:0000000000000000\nCapBnd:0000000000000000\nNoNewPrivs:1\n\
                    Seccomp:2\nread-only\nwritable\ninit-is-closed\n0 1 2 3 \n700\nno-docker\n500\n0\n";
    assert_eq!(outcome.stdout(), expected, "{}", outcome.stderr());
}

#[test]
fn limits_are_raised_before_the_command_and_docker_agrees_with_the_kernel() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let [idle] = &docker::containers(&shim.label())[..] else {
        panic!("one container")
    };
    let config = docker::inspect(idle)["HostConfig"].clone();
    assert_eq!(config["CpuQuota"], 10_000);
    assert_eq!(config["Memory"], 256 << 20);
    assert_eq!(config["PidsLimit"], 64);

    // The container sees its own cgroups read-only: the limits of its first instruction.
    let mut run = client
        .start(RunStart {
            stdin: true,
            ..shell("anthropic", CGROUPS)
        })
        .unwrap();
    let mut text = String::new();
    while text.lines().count() < 3 {
        if let Some(Event::Stdout(output)) = client.next(&mut run).unwrap() {
            text.push_str(&String::from_utf8_lossy(&output.data));
        }
    }
    assert_eq!(text, format!("50000\n{}\n256\n", 512 << 20));

    wait_until(
        "docker inspect with the run class",
        Duration::from_secs(10),
        || {
            let config = docker::inspect(idle)["HostConfig"].clone();
            let told = (
                config["CpuQuota"].as_i64(),
                config["Memory"].as_i64(),
                config["PidsLimit"].as_i64(),
            );
            if told == (Some(50_000), Some(512 << 20), Some(256)) {
                Ok(())
            } else {
                Err(format!("{told:?}"))
            }
        },
    );
    let tbf = String::from_utf8(output(Command::new("tc").args(["qdisc", "show"])).stdout).unwrap();
    assert!(
        tbf.contains("tbf 1: dev veth") && tbf.contains("rate 10Mbit"),
        "{tbf}"
    );
    client.send(
        &run,
        Input::CloseStdin(polydev_proto::runtime::CloseStdin {}),
    );
    while !matches!(client.next(&mut run).unwrap(), Some(Event::Exited(_))) {}
}

/// Prints quota, memory and pids limits, of cgroups v1 or v2, then waits for stdin.
const CGROUPS: &str = "cd /sys/fs/cgroup; \
    if [ -e cpu.max ]; then cut -d' ' -f1 cpu.max; cat memory.max pids.max; \
    else cat cpu/cpu.cfs_quota_us memory/memory.limit_in_bytes pids/pids.max; fi; read line";

#[test]
fn traffic_is_held_to_the_run_class_both_ways() {
    let host = Host::start();
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    // 2.5 MB at 10 Mbit/s take 2 s, less the burst of 64 KiB. Without a limit they take far less.
    let script = format!(
        "head -c 2500000 /dev/zero | curl --silent --output /dev/null --data-binary @- \
         --write-out '%{{time_total}}' {}/v1/nothing",
        host.url
    );
    let outcome = client.run(shell("anthropic", &script)).unwrap();
    let upload: f64 = outcome.stdout().parse().unwrap();
    assert!(
        (1.7..6.0).contains(&upload),
        "2.5 MB went out in {upload} s"
    );
}

#[test]
fn every_byte_arrives_whatever_the_size_and_stdin_is_carried() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let input: Bytes = (0..5_000_000u32)
        .flat_map(|n| (n % 251).to_le_bytes())
        .take(5_000_000)
        .collect();
    let outcome = client
        .run_with_stdin(argv("anthropic", &["cat"]), input.clone())
        .unwrap();
    assert!(
        outcome.stdout == input,
        "{} bytes came back",
        outcome.stdout.len()
    );
    assert_eq!(outcome.exited.exit_code, 0);
}

#[test]
fn output_of_both_streams_is_complete_at_a_sudden_end() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let script = "seq 1 200000; seq 1 100000 >&2; kill -9 $$";
    let outcome = client.run(shell("anthropic", script)).unwrap();
    let count = |last: u32| (1..=last).map(|n| format!("{n}\n")).collect::<String>();
    assert!(
        outcome.stdout() == count(200_000),
        "{} bytes",
        outcome.stdout.len()
    );
    assert!(
        outcome.stderr() == count(100_000),
        "{} bytes",
        outcome.stderr.len()
    );
    assert_eq!(outcome.exited.reason(), ExitReason::Signaled);
    assert_eq!((outcome.exited.signal, outcome.exited.exit_code), (9, 137));
}

#[test]
fn a_reader_that_stops_stops_the_command() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let mut run = client
        .start(shell("anthropic", "seq 1 3000000; echo end >&2"))
        .unwrap();
    // Between the command and here: the pipe, init's megabyte, sockets, a few queues.
    // 22 MB do not fit, so the command cannot reach its end while nobody reads.
    let [container] = &docker::containers(&shim.label())[..] else {
        panic!("one container")
    };
    let pid = docker::inspect(container)["State"]["Pid"].to_string();
    let blocked = || {
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let child = children
            .split_whitespace()
            .next()
            .ok_or("not started")?
            .to_owned();
        let of_child = std::fs::read_to_string(format!("/proc/{child}/task/{child}/children"));
        let seq = of_child.unwrap_or_default().trim().to_owned();
        let wchan =
            std::fs::read_to_string(format!("/proc/{seq}/wchan")).map_err(|e| e.to_string())?;
        if wchan.contains("pipe_write") {
            Ok(())
        } else {
            Err(wchan)
        }
    };
    wait_until(
        "a command that waits for its reader",
        Duration::from_secs(20),
        blocked,
    );

    let mut stdout = 0;
    loop {
        match client.next(&mut run).unwrap() {
            Some(Event::Stdout(output)) => stdout += output.data.len(),
            Some(Event::Exited(exited)) => {
                assert_eq!(exited.stdout_bytes, stdout as u64);
                assert_eq!(exited.exit_code, 0);
                break;
            }
            _ => {}
        }
    }
    assert_eq!(stdout, 22_888_896);
}

#[test]
fn prompts_reach_the_command_byte_for_byte() {
    let host = Host::start();
    let shim = Shim::dev(&["openai=1", "anthropic=1", "google=1"]);
    let client = shim.client();
    let letters = |count: u32| -> String {
        let letter = |n: u32| char::from(b'a' + u8::try_from(n % 26).unwrap());
        (0..count).map(letter).collect()
    };
    // Below the kernel's limit for an argument, and above it.
    let (long, longer) = (letters(100_000), letters(400_000));
    let awkward = [
        "$(id) `id` ${HOME}",
        "it's \"quoted\" \\ and\nnew\nlines\n",
        "--help",
        "-p -- -",
    ];

    // As an argument of any command ...
    for text in awkward.into_iter().chain([&*long]) {
        let outcome = client
            .run(argv("anthropic", &["printf", "%s", text]))
            .unwrap();
        assert!(outcome.stdout() == text, "{:?}", outcome.stdout());
    }
    // ... and through each real CLI to the model.
    let through = |provider: &str| {
        let client = shim.client();
        for text in awkward.into_iter().chain([&*longer]) {
            let key = fresh_key();
            let outcome = client
                .run(prompt(provider, text, &key, &host.url))
                .expect("a whole run");
            assert_eq!(
                outcome.exited.exit_code,
                0,
                "{provider}: {}",
                outcome.stderr()
            );
            // The key identifies the request: other requests arrive meanwhile.
            let heard = host.requests().iter().any(|request| {
                let is_own = request
                    .credentials
                    .values()
                    .any(|shown| shown.contains(&key));
                is_own
                    && request.texts.iter().any(|heard| {
                        // A CLI may trim the ends of what a person types.
                        [Text::of(text), Text::of(text.trim())].contains(heard)
                    })
            });
            assert!(heard, "{provider} did not pass on {text:?}");
        }
    };
    std::thread::scope(|scope| {
        for provider in ["openai", "anthropic", "google"] {
            scope.spawn(move || through(provider));
        }
    });
}

/// The commands are those of docs/agents.md.
#[test]
fn a_cli_that_is_an_own_command_asks_the_server_that_the_run_names() {
    let host = Host::start();
    let shim = Shim::dev(&["openai=1", "anthropic=1", "google=1"]);
    let client = shim.client();
    let commands: [(&str, &[&str]); 3] = [
        (
            "anthropic",
            &["claude", "-p", "--dangerously-skip-permissions"],
        ),
        (
            "openai",
            &[
                "codex",
                "exec",
                "--dangerously-bypass-approvals-and-sandbox",
                "--skip-git-repo-check",
            ],
        ),
        ("google", &["gemini", "--skip-trust", "--yolo", "--prompt"]),
    ];
    for (provider, command) in commands {
        let text = format!("Do you answer {provider}?");
        let command = [command, &[&*text]].concat();
        let start = RunStart {
            command: argv(provider, &command).command,
            ..prompt(provider, &text, &fresh_key(), &host.url)
        };
        let outcome = client.run(start).unwrap();
        assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
        let mut heard = host
            .requests()
            .into_iter()
            .flat_map(|request| request.texts);
        assert!(heard.any(|heard| heard == Text::of(&text)), "{provider}");
    }
}

#[test]
fn an_idle_container_that_dies_is_replaced() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let [container] = &docker::containers(&shim.label())[..] else {
        panic!("one container")
    };
    docker::docker(&["kill", container]);
    wait_until("another container", Duration::from_secs(60), || {
        let now = docker::containers(&shim.label());
        if now.len() == 1 && now[0] != *container {
            Ok(())
        } else {
            Err(format!("{now:?}"))
        }
    });
    client.wait_idle("anthropic", 1);
    assert_eq!(
        client.run(shell("anthropic", "echo hi")).unwrap().stdout(),
        "hi\n"
    );
}

#[test]
fn runs_at_once_each_get_a_container_or_wait_for_one() {
    let shim = Shim::dev(&["anthropic=3"]);
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..6)
            .map(|n| {
                let client = shim.client();
                scope.spawn(move || client.run(shell("anthropic", &format!("hostname; echo {n}"))))
            })
            .collect();
        let mut hosts = std::collections::HashSet::new();
        for (n, run) in runs.into_iter().enumerate() {
            let outcome = run.join().unwrap().unwrap();
            let text = outcome.stdout();
            let (host, echo) = text.split_once('\n').unwrap();
            assert_eq!(echo, format!("{n}\n"));
            assert!(hosts.insert(host.to_owned()), "two runs in one container");
        }
    });
}

#[test]
fn the_command_line_is_transparent() {
    let shim = Shim::dev(&["anthropic=2"]);
    let mut command = shim.run_command();
    command.args([
        "anthropic",
        "--user",
        "alice",
        "--",
        "sh",
        "-c",
        "echo $USER_ID; echo err >&2; exit 9",
    ]);
    let result = output(&mut command);
    assert_eq!(String::from_utf8_lossy(&result.stdout), "alice\n");
    assert_eq!(String::from_utf8_lossy(&result.stderr), "err\n");
    assert_eq!(result.status.code(), Some(9));

    let mut command = shim.run_command();
    command.args(["anthropic", "--output", "json", "--", "printf", "hi"]);
    let result = output(&mut command);
    let lines = String::from_utf8(result.stdout).unwrap();
    let events: Vec<serde_json::Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let names: Vec<_> = events
        .iter()
        .map(|event| event["event"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["accepted", "started", "stdout", "exited"]);
    assert_eq!(events[2]["data"], "aGk=");
    assert_eq!(events[3]["exit_code"], 0);

    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut command = shim.run_command();
    command
        .env("TRACEPARENT", trace)
        .args(["anthropic", "--", "printenv", "TRACEPARENT"]);
    assert_eq!(
        String::from_utf8_lossy(&output(&mut command).stdout),
        format!("{trace}\n")
    );

    let result = output(
        shim.run_command()
            .args(["anthropic", "--", "no-such-program"]),
    );
    assert_eq!(result.status.code(), Some(127));
}
