//! Slots that are made on demand, under a real Nomad agent.

use std::time::Duration;

use polydev_proto::runtime::{ExitReason, RunStart};
use polydev_tests::{
    client::shell, docker, nomad::Nomad, shim::Shim, shim::instance_label, wait_until,
};
use serde_json::Value;
use tonic::Code;

const JOB: &str = "polydev-on-demand-anthropic";
const FILE: &str = "jobspecs/on-demand-anthropic.nomad.hcl";

/// What was dispatched of the job, newest last.
fn dispatched(nomad: &Nomad) -> Vec<Value> {
    let mut jobs = match nomad.get(&format!("/v1/jobs?prefix={JOB}/")) {
        Value::Array(jobs) => jobs,
        _ => vec![],
    };
    jobs.sort_by_key(|job| job["CreateIndex"].as_u64());
    jobs
}

#[test]
fn a_run_that_finds_no_idle_slot_gets_one_of_its_own() {
    let nomad = Nomad::start();
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    let label = instance_label(&nomad.state_dir());

    // Without the job there is none to be had, and the caller is told.
    let short = RunStart {
        queue_timeout: Some(prost_types::Duration {
            seconds: 2,
            nanos: 0,
        }),
        ..shell("anthropic", "true")
    };
    let refused = client.run(short.clone()).unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(
        refused
            .message()
            .contains(&format!("without the job `{JOB}`")),
        "{refused}"
    );

    // One that Nomad cannot place is told as such, and is not left behind.
    nomad.run(&[
        "job",
        "run",
        "-detach",
        "-var",
        "datacenters=[\"nowhere\"]",
        FILE,
    ]);
    let refused = client.run(short).unwrap_err();
    assert!(
        refused.message().contains("Nomad has no room yet for"),
        "{refused}"
    );
    wait_until("the order's end", Duration::from_secs(20), || {
        let jobs = dispatched(&nomad);
        match &jobs[..] {
            [job] if job["Status"] == "dead" => Ok(()),
            _ => Err(format!("{jobs:?}")),
        }
    });

    nomad.run(&["job", "run", "-detach", FILE]);
    let outcome = client
        .run(shell("anthropic", "echo a-word-of-its-own"))
        .unwrap();
    assert_eq!(outcome.stdout(), "a-word-of-its-own\n");
    assert!(!outcome.accepted.warm && !outcome.exited.warm);
    let stages: Vec<&str> = outcome
        .exited
        .timeline
        .iter()
        .map(|stage| &stage.name[..])
        .collect();
    assert_eq!(stages[..3], ["received", "dispatched", "claimed"]);
    let job = dispatched(&nomad).pop().unwrap();
    let child = job["ID"].as_str().unwrap();
    // Nomad knows the run's id, and nothing of what it ran.
    let described = nomad.get(&format!("/v1/job/{child}"));
    assert_eq!(described["Meta"]["run_id"], *outcome.accepted.run_id);
    assert_eq!(described["Payload"], Value::Null);
    let (group, task) = (
        &described["TaskGroups"][0],
        &described["TaskGroups"][0]["Tasks"][0],
    );
    assert_eq!(described["Priority"], 50);
    assert_eq!(group["RestartPolicy"]["Attempts"], 0);
    let reschedule = &group["ReschedulePolicy"];
    assert_eq!(
        (&reschedule["Attempts"], &reschedule["Unlimited"]),
        (&0.into(), &false.into())
    );
    let limits = &task["Resources"];
    assert_eq!(
        (&limits["CPU"], &limits["MemoryMB"]),
        (&500.into(), &512.into())
    );
    assert_eq!(task["KillTimeout"], 30_000_000_000_u64);
    assert!(!described.to_string().contains("a-word-of-its-own"));
    wait_until("its job's end", Duration::from_secs(20), || {
        let allocations = nomad.allocations(child);
        match &allocations[..] {
            [alloc] if alloc["ClientStatus"] == "complete" => Ok(()),
            _ => Err(format!("{allocations:?}")),
        }
    });

    // Stopping it ends its run.
    let run = client.start(shell("anthropic", "sleep 100")).unwrap();
    let child = dispatched(&nomad).pop().unwrap()["ID"]
        .as_str()
        .unwrap()
        .to_owned();
    nomad.run(&["job", "stop", "-detach", "-yes", &child]);
    let outcome = client.finish(run).unwrap();
    assert_eq!(outcome.exited.reason(), ExitReason::Cancelled);
    assert_eq!(
        outcome.exited.message,
        "it was cancelled: Nomad stopped its slot"
    );

    wait_until("an empty node", Duration::from_secs(20), || {
        let containers = docker::containers(&label);
        if containers.is_empty() {
            Ok(())
        } else {
            Err(format!("{containers:?}"))
        }
    });
}
