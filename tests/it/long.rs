//! Tests that take minutes: `make test-long`.

use std::{
    fs::{self, File},
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use polydev_proto::runtime::{ExitReason, RunStart, RunState, run_input::Input};
use polydev_tests::{
    client,
    cluster::Cluster,
    docker,
    job::{IMAGE, service, shell, task},
    nomad::Nomad,
    process::output,
    shim::{Shim, instance_label},
    wait_until,
};
use tonic::Code;
use tonic_types::StatusExt;

use crate::{
    exec::truncated,
    output::every_line_of,
    survive::{driver, kill_driver},
};

#[test]
fn a_dockerd_killed_in_the_middle_of_a_call_is_got_over() {
    crate::faults::a_dockerd_is_killed_in_the_middle_of_calls();
}

#[test]
fn a_wrong_job_fails_with_the_name_of_the_field_and_leaves_nothing() {
    crate::refusals::a_wrong_job_is_refused();
}

#[test]
fn a_helper_is_asked_and_an_image_that_is_used_again_stays() {
    crate::registry::a_helper_is_asked_and_a_used_image_stays();
}

#[test]
fn a_folder_that_is_exchanged_for_a_minute_does_not_lead_out() {
    crate::mounts::race(Duration::from_secs(60));
}

#[test]
fn forty_allocations_at_once_lose_no_line_ten_times_over() {
    let nomad = Nomad::start();
    for round in 0..10 {
        every_line_of(&nomad, &format!("forty-{round}"), 40);
    }
}

/// Through the same agent, Nomad's Docker driver cut 35 of 100 such outputs short. `docker exec`
/// itself cut none. So neither the agent nor dockerd loses the output.
#[test]
fn nothing_is_cut_off_the_end_of_an_exec_two_hundred_times() {
    let nomad = Nomad::start();
    nomad.submit(&service("open", shell("while :; do sleep 1; done")));
    let id = nomad.wait_started("open");
    assert_eq!(truncated(&nomad, &id, 200), 0);
}

/// Every five minutes, Nomad's Docker driver removes its own containers that are in no task. Our
/// driver does the same with its own. Neither removes containers of the other.
#[test]
fn beside_nomads_docker_driver_nothing_is_killed() {
    let nomad = Nomad::start_beside_docker("");
    let ours = service("ours", shell("while :; do sleep 1; done"));
    let mut theirs = service("theirs", shell("while :; do sleep 1; done"));
    task(&mut theirs)["Driver"] = "docker".into();
    nomad.submit(&ours);
    nomad.submit(&theirs);
    let containers = ["ours", "theirs"].map(|job| {
        let id = nomad.wait_started(job);
        let label = if job == "ours" {
            "dev.polydev"
        } else {
            "com.hashicorp.nomad"
        };
        let found = docker::containers(&format!("{label}.alloc_id={id}"));
        assert_eq!(found.len(), 1, "{job}: {found:?}");
        found[0].clone()
    });
    let end = Instant::now() + Duration::from_secs(11 * 60);
    wait_until("eleven minutes", Duration::from_secs(12 * 60), || {
        for container in &containers {
            assert_eq!(
                docker::inspect(container)["State"]["Running"],
                true,
                "{container}"
            );
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            Ok(())
        } else {
            Err(format!("{left:?} to go"))
        }
    });
    for job in ["ours", "theirs"] {
        assert_eq!(nomad.allocations(job).len(), 1, "{job} was started anew");
    }
}

/// After the grace period, the driver removes a container that has its labels and no record. It
/// leaves other containers alone.
#[test]
fn what_belongs_to_nothing_is_removed_and_nothing_else() {
    let often = "gc {\n dangling_containers {\n period = \"1m\"\n creation_grace = \"1m\"\n }\n }";
    let nomad = Nomad::start_with(often);
    let ours = instance_label(&nomad.state_dir());
    let run = |label: &str| {
        let id = docker::docker(&["run", "--detach", "--label", label, IMAGE, "sleep", "10000"]);
        id.trim().to_owned()
    };
    let (stray, foreign) = (run(&ours), run("dev.polydev.instance=somebody-elses"));
    nomad.submit(&service("open", shell("while :; do sleep 1; done")));
    let alloc = nomad.wait_started("open");
    wait_until("the stray's end", Duration::from_secs(4 * 60), || {
        let left = docker::containers(&ours);
        if left.contains(&stray) {
            Err(format!("{left:?}"))
        } else {
            Ok(())
        }
    });
    assert_eq!(docker::inspect(&foreign)["State"]["Running"], true);
    assert_eq!(nomad.wait_started("open"), alloc);
    docker::docker(&["rm", "--force", &foreign]);
}

#[test]
fn an_image_that_fails_again_and_again_is_left_alone_until_it_is_another() {
    let nomad = Nomad::start();
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    let image = format!("pdtest-image-{:08x}:1", rand::random::<u32>());
    docker::docker(&["tag", "polydev-anthropic-runtime:latest", &image]);
    let named = format!("image={image}");
    let file = "jobspecs/pool-anthropic.nomad.hcl";
    let args = ["job", "run", "-detach", "-var", "count=1", "-var", &named];
    nomad.run(&[&args[..], &[file]].concat());
    client.wait_idle("anthropic", 1);

    let label = instance_label(&nomad.state_dir());
    let is_left_alone = || nomad.agent_log().contains("times in a row and is paused");
    wait_until("the end of patience", Duration::from_secs(90), || {
        if is_left_alone() {
            return Ok(());
        }
        let containers = docker::containers(&label);
        if client.pool("anthropic").idle == 1 {
            for id in &containers {
                output(docker::command().args(["kill", id]));
            }
        }
        Err(format!("{containers:?}"))
    });
    wait_until("an empty slot", Duration::from_secs(10), || {
        let (pool, containers) = (client.pool("anthropic"), docker::containers(&label));
        if pool.warming == 1 && containers.is_empty() {
            Ok(())
        } else {
            Err(format!("{pool:?} {containers:?}"))
        }
    });

    let made = docker::docker(&["create", &image]);
    docker::docker(&["commit", "--change", "LABEL mended=1", made.trim(), &image]);
    docker::docker(&["rm", made.trim()]);
    client.wait_idle("anthropic", 1);
    assert!(
        nomad
            .agent_log()
            .contains("the image has changed, trying it again")
    );
    nomad.run(&["job", "stop", "-detach", "-yes", "polydev-pool-anthropic"]);
    wait_until("its container's removal", Duration::from_secs(30), || {
        let containers = docker::containers(&label);
        if containers.is_empty() {
            Ok(())
        } else {
            Err(format!("{containers:?}"))
        }
    });
    docker::docker(&["rmi", &image]);
}

#[test]
fn a_slot_on_demand_whose_run_does_not_come_ends_after_a_minute() {
    let nomad = Nomad::start();
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    let job = "polydev-on-demand-anthropic";
    nomad.run(&[
        "job",
        "run",
        "-detach",
        "jobspecs/on-demand-anthropic.nomad.hcl",
    ]);
    let run_id = format!("run_id={}", uuid::Uuid::now_v7());
    nomad.run(&["job", "dispatch", "-detach", "-meta", &run_id, job]);
    wait_until("its slot", Duration::from_secs(30), || {
        match client.pool("anthropic") {
            pool if pool.on_demand == 1 && pool.slots == 0 => Ok(()),
            pool => Err(format!("{pool:?}")),
        }
    });
    let jobs = nomad.get(&format!("/v1/jobs?prefix={job}/"));
    let child = jobs[0]["ID"].as_str().unwrap();
    let events = wait_until("its end", Duration::from_secs(90), || {
        let allocations = nomad.allocations(child);
        match &allocations[..] {
            [alloc] if alloc["ClientStatus"] == "complete" => {
                Ok(alloc["TaskStates"]["runtime"]["Events"].to_string())
            }
            _ => Err(format!("{allocations:?}")),
        }
    });
    assert!(
        events.contains("Its run did not come within 60 s"),
        "{events}"
    );
    assert!(docker::containers(&instance_label(&nomad.state_dir())).is_empty());
}

#[test]
fn slots_wait_for_a_dockerd_that_is_away_however_long() {
    let mut cluster = Cluster::start();
    let shim = cluster.shim();
    let file = "jobspecs/pool-anthropic.nomad.hcl";
    cluster.run(&["job", "run", "-detach", "-var", "count=2", file]);
    let client = shim.client();
    client.wait_idle("anthropic", 2);
    for engine in &mut cluster.engines {
        engine.kill();
    }
    client.run(client::shell("anthropic", "true")).unwrap();
    // Longer than a slot tolerates failures of its own.
    std::thread::park_timeout(Duration::from_secs(35));
    assert_eq!(client.pool("anthropic").failed, 0);
    for engine in &mut cluster.engines {
        engine.restart();
    }
    client.wait_idle("anthropic", 2);
    let allocations = cluster.get("/v1/job/polydev-pool-anthropic/allocations");
    let allocations = allocations.as_array().unwrap();
    assert_eq!(allocations.len(), 2);
    for alloc in allocations {
        assert_eq!(alloc["TaskStates"]["runtime"]["Restarts"], 0, "{alloc}");
    }
}

#[test]
fn a_node_that_nomad_has_lost_keeps_its_runs_within_reach_of_every_shim() {
    let mut cluster = Cluster::start();
    let shims = [cluster.shim(), cluster.shim()];
    let file = "jobspecs/pool-anthropic.nomad.hcl";
    cluster.run(&["job", "run", "-detach", "-var", "count=2", file]);
    let clients = shims.each_ref().map(Shim::client);
    for client in &clients {
        client.wait_idle("anthropic", 2);
    }
    let start = RunStart {
        stdin: true,
        ..client::shell("anthropic", "echo begun; read line; echo $line")
    };
    let mut run = clients[0].start(start).unwrap();
    let nodes = cluster.get("/v1/nodes");
    let mut nodes = nodes.as_array().into_iter().flatten();
    let node = nodes.find(|node| node["ID"] == *run.accepted.node_id);
    let number = usize::from(node.unwrap()["Name"] == "client1");

    cluster.agent(number).end(Signal::SIGKILL);
    let path = format!("/v1/node/{}", run.accepted.node_id);
    wait_until("a lost node", Duration::from_secs(90), || {
        let status = cluster.get(&path)["Status"].clone();
        if status == "down" {
            Ok(())
        } else {
            Err(status.to_string())
        }
    });
    // Longer than a shim's interval between two looks at the nodes, and the time for the answers.
    let looked = Instant::now();
    while looked.elapsed() < Duration::from_secs(3) {
        for client in &clients {
            let going = client.get_run(&run.accepted.run_id).unwrap();
            assert_eq!(going.state(), RunState::Running);
        }
    }
    let attached = clients[1].attach(&run.accepted.run_id, [0; 2]).unwrap();
    cluster.restart_agent(number, Signal::SIGKILL);
    cluster.wait_healthy();
    // Nomad has placed another slot for the pool, and stops the lost one.
    clients[0].send(&run, Input::Stdin(b"further\n".to_vec().into()));
    run.close();
    for (client, run) in clients.iter().zip([run, attached]) {
        let outcome = client.finish(run).unwrap();
        assert_eq!(outcome.stdout(), "begun\nfurther\n");
        assert_eq!(outcome.exited.reason(), ExitReason::Exited);
    }
    for client in &clients {
        client.wait_idle("anthropic", 2);
    }
}

#[test]
fn a_driver_that_does_not_answer_leaves_no_run_in_doubt_that_it_can_settle() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let holder = driver(&shim.state_dir());
    let stopped = |script: &str, time: Option<Duration>| {
        kill(holder, Signal::SIGSTOP).unwrap();
        let outcome = std::thread::scope(|scope| {
            let start = RunStart {
                queue_timeout: Some(prost_types::Duration {
                    seconds: 60,
                    nanos: 0,
                }),
                ..client::shell("anthropic", script)
            };
            let run = scope.spawn(|| shim.client().run(start));
            if let Some(time) = time {
                std::thread::park_timeout(time);
                kill(holder, Signal::SIGCONT).unwrap();
            }
            run.join().unwrap()
        });
        kill(holder, Signal::SIGCONT).unwrap();
        client.wait_idle("anthropic", 1);
        outcome
    };
    // Longer than the shim waits for the answer to a claim. The run has not started, and starts
    // later.
    let late = stopped("echo late", Some(Duration::from_secs(13))).unwrap();
    assert_eq!(late.stdout(), "late\n");
    // The driver never answers.
    let told = stopped("echo never", None).unwrap_err();
    assert_eq!(told.code(), Code::Aborted, "{told}");
    let details = told.get_error_details();
    assert_eq!(details.error_info().unwrap().reason, "UNCLEAR");
    let outcome = client.run(client::shell("anthropic", "echo on")).unwrap();
    assert_eq!(outcome.stdout(), "on\n");
}

#[test]
fn a_claim_that_cannot_be_written_down_is_refused_and_its_slot_stays() {
    let nomad = Nomad::start_with_small_state("");
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    nomad.submit_pool("anthropic", 1);
    client.wait_idle("anthropic", 1);
    let filler = nomad.state_dir().join("filler");
    let mut file = File::create(&filler).unwrap();
    std::io::copy(&mut std::io::repeat(0), &mut file).unwrap_err();
    let at_once = || RunStart {
        queue_timeout: Some(prost_types::Duration::default()),
        ..client::shell("anthropic", "true")
    };
    // Some claims still fit into the last page of the journal.
    let refused = (0..50).find_map(|_| {
        client.wait_idle("anthropic", 1);
        client.run(at_once()).err()
    });
    let refused = refused.expect("the disk is full");
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("runs.journal"), "{refused}");
    client.wait_idle("anthropic", 1);

    drop(file);
    fs::remove_file(filler).unwrap();
    let ran = client.run(client::shell("anthropic", "echo on")).unwrap();
    assert_eq!(ran.stdout(), "on\n");
    kill_driver(&nomad);
    client.wait_idle("anthropic", 1);
    let again = client.attach(&ran.accepted.run_id, [0; 2]).unwrap();
    assert_eq!(client.finish(again).unwrap().stdout(), "on\n");
}
