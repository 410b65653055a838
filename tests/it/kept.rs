//! What stays as it was when something is refused, cancelled or asked for again.

use std::process::Command;

use polydev_proto::{
    driver::{InspectTaskRequest, StopTaskRequest, WaitTaskRequest},
    init::ArtifactRules,
    node::{CancelRunRequest, GetRunRequest, Run, RunSpec, ended::Reason, run, run_event::Event},
    workspace,
};
use polydev_shim::engine::embedded::pools;
use polydev_tests::{folder::Folder, process::succeed};
use tonic::Code;

use crate::host::{Host, id_of, shell};

fn slot() -> pools::Slot {
    pools::Slot::new(
        "anthropic".parse().expect("a provider"),
        "node",
        pools::Options::default(),
    )
}

/// Waits until the run has ended.
async fn ended(host: &mut Host, run_id: &str) -> Run {
    loop {
        let request = GetRunRequest {
            run_id: run_id.into(),
            user_id: "user".into(),
        };
        let run = host.node.get_run(request).await.expect("it is known");
        let run = run.into_inner().run.expect("it is told");
        if run.state() == run::State::Ended {
            return run;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_gets_no_slot_costs_nobody_its_results() {
    let folder = Folder::new("pdtest-");
    let state = folder.path().join("s");
    let mut host = Host::launch(&state).await;
    let handle = host.start_slot(&slot()).await;
    let is_end = |event: &Event| matches!(event, Event::Ended(_));
    let run_id = host.start(shell("echo kept"), is_end).await;

    // No run's output fits any longer.
    let output = state.join("output");
    let remount = ["-o", "remount,size=8m"];
    succeed(Command::new("mount").args(remount).arg(&output));

    let (_, refused) = host.claim(shell("true"), 1).await;
    assert_eq!(refused.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(host.answer(&run_id, "").await, b"kept\n");

    // A claim that would get the slot discards the results, and still finds no room.
    let (_, refused) = host.claim(shell("true"), 0).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    let request = GetRunRequest {
        run_id,
        ..Default::default()
    };
    let gone = host.node.get_run(request).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound, "{gone}");
    host.destroy(&handle).await;
    host.plugin.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_run_tells_the_size_of_artifacts_that_nobody_fetched() {
    const SIZE: u64 = 30_000_000;
    let folder = Folder::new("pdtest-");
    let state = folder.path().join("s");
    let mut host = Host::launch(&state).await;
    let handle = host.start_slot(&slot()).await;
    let spec = RunSpec {
        artifacts: Some(ArtifactRules {
            patterns: vec!["a".into()],
            max_bytes: SIZE,
            max_files: 1,
        }),
        work_dir: workspace::PATH.into(),
        ..shell(&format!("head -c {SIZE} /dev/zero > a"))
    };
    let is_found = |event: &Event| matches!(event, Event::Artifacts(_));
    let run_id = host.start(spec, is_found).await;
    let request = CancelRunRequest {
        run_id: run_id.clone(),
        user_id: "user".into(),
        ..Default::default()
    };
    host.node.cancel_run(request).await.expect("it is known");
    let run = ended(&mut host, &run_id).await;
    let end = run.ended.expect("an ended run has an end");
    assert_eq!(end.reason(), Reason::Exited, "{end:?}");
    assert_eq!(end.artifact_bytes, SIZE, "{end:?}");
    host.destroy(&handle).await;
    host.plugin.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ended_slot_ended_at_one_time() {
    let folder = Folder::new("pdtest-");
    let host = Host::launch(&folder.path().join("s")).await;
    let handle = host.start_slot(&slot()).await;
    let task_id = id_of(&handle);
    let mut driver = host.plugin.driver();
    let stop = StopTaskRequest {
        task_id: task_id.clone(),
        ..Default::default()
    };
    driver.stop_task(stop).await.expect("it is known");
    let wait = WaitTaskRequest {
        task_id: task_id.clone(),
    };
    driver.wait_task(wait).await.expect("it is known");
    let mut completed = async || {
        let task_id = task_id.clone();
        let told = driver.inspect_task(InspectTaskRequest { task_id }).await;
        let task = told.expect("it is known").into_inner().task;
        task.and_then(|task| task.completed_at)
    };
    let first = completed().await;
    assert!(first.is_some_and(|time| time.seconds > 0), "{first:?}");
    assert_eq!(completed().await, first);
    host.destroy(&handle).await;
    host.plugin.shutdown().await;
}
