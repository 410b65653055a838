//! Slots that are made on demand, under a real Nomad agent.

use std::time::Duration;

use polydev_proto::runtime::{ExitReason, RunStart};
use polydev_tests::{
    client::{Client, Outcome, shell},
    docker,
    nomad::Nomad,
    shim::{Shim, instance_label},
    wait_until,
};
use serde_json::Value;
use tonic::Code;

const JOB: &str = "polydev-on-demand-anthropic";
const FILE: &str = "jobspecs/on-demand-anthropic.nomad.hcl";

/// The dispatched jobs, the newest last.
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
    without_the_job_its_caller_is_told(&client);
    an_order_that_nomad_cannot_place_is_told_and_withdrawn(&nomad, &client);

    nomad.run(&["job", "run", "-detach", FILE]);
    let outcome = a_run_gets_a_slot(&client);
    let job = dispatched(&nomad).pop().unwrap();
    let child = job["ID"].as_str().unwrap();
    nomad_knows_its_id_and_nothing_of_what_it_ran(&nomad, child, &outcome);
    wait_until("its job's end", Duration::from_secs(20), || {
        let allocations = nomad.allocations(child);
        match &allocations[..] {
            [alloc] if alloc["ClientStatus"] == "complete" => Ok(()),
            _ => Err(format!("{allocations:?}")),
        }
    });

    stopping_a_slot_cancels_its_run(&nomad, &client);
    let label = instance_label(&nomad.state_dir());
    wait_until("an empty node", Duration::from_secs(20), || {
        let containers = docker::containers(&label);
        if containers.is_empty() {
            Ok(())
        } else {
            Err(format!("{containers:?}"))
        }
    });
}

/// A run that waits at most two seconds for a slot.
fn short() -> RunStart {
    RunStart {
        queue_timeout: Some(prost_types::Duration {
            seconds: 2,
            nanos: 0,
        }),
        ..shell("anthropic", "true")
    }
}

fn without_the_job_its_caller_is_told(client: &Client) {
    let refused = client.run(short()).expect_err("there is no slot");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(
        refused
            .message()
            .contains(&format!("Nomad has no job `{JOB}`")),
        "{refused}"
    );
}

fn an_order_that_nomad_cannot_place_is_told_and_withdrawn(nomad: &Nomad, client: &Client) {
    nomad.run(&[
        "job",
        "run",
        "-detach",
        "-var",
        "datacenters=[\"nowhere\"]",
        FILE,
    ]);
    let refused = client.run(short()).expect_err("there is no slot");
    assert!(
        refused.message().contains("Nomad has no room yet for"),
        "{refused}"
    );
    wait_until("the order's end", Duration::from_secs(20), || {
        let jobs = dispatched(nomad);
        match &jobs[..] {
            [job] if job["Status"] == "dead" => Ok(()),
            _ => Err(format!("{jobs:?}")),
        }
    });
}

fn a_run_gets_a_slot(client: &Client) -> Outcome {
    let outcome = client.run(shell("anthropic", "echo a-word-of-its-own"));
    let outcome = outcome.expect("a run with a slot");
    assert_eq!(outcome.stdout(), "a-word-of-its-own\n");
    assert!(!outcome.accepted.warm && !outcome.exited.warm);
    let stages: Vec<&str> = outcome
        .exited
        .timeline
        .iter()
        .map(|stage| &stage.name[..])
        .collect();
    assert_eq!(stages[..3], ["received", "dispatched", "claimed"]);
    outcome
}

fn nomad_knows_its_id_and_nothing_of_what_it_ran(nomad: &Nomad, child: &str, outcome: &Outcome) {
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
}

fn stopping_a_slot_cancels_its_run(nomad: &Nomad, client: &Client) {
    let run = client.start(shell("anthropic", "sleep 100"));
    let run = run.expect("a run with a slot");
    let job = dispatched(nomad).pop().expect("it was dispatched");
    let child = job["ID"].as_str().expect("a job has an id");
    nomad.run(&["job", "stop", "-detach", "-yes", child]);
    let outcome = client.finish(run).expect("a clean end");
    assert_eq!(outcome.exited.reason(), ExitReason::Cancelled);
    assert_eq!(
        outcome.exited.message,
        "it was cancelled: Nomad stopped its slot"
    );
}
