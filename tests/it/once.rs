//! A run starts only once: its id identifies it, and other tries of the run are fenced off.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use nix::sys::signal::{Signal, kill};
use polydev_proto::{
    node::{
        Ballot, FenceRequest, FenceResponse, fence_response::Answer,
        node_service_client::NodeServiceClient,
    },
    runtime::{RunStart, run_input::Input},
};
use polydev_tests::{client::shell, shim::Shim};
use tonic::Code;
use tonic_types::StatusExt;
use uuid::{NoContext, Uuid};

use crate::survive::driver;

/// The time in which a claim must start, which the shim sets.
const START_BY: Duration = Duration::from_secs(5);

#[test]
fn a_run_is_started_once_however_often_it_is_asked_for() {
    let shim = Shim::dev(&["anthropic=2"]);
    let client = shim.client();
    let run_id = Uuid::now_v7().to_string();
    let start = |attempt, script: &str| RunStart {
        run_id: run_id.clone(),
        attempt,
        ..shell("anthropic", script)
    };
    let script = "cat /proc/sys/kernel/random/uuid; read line; echo $line";
    let first = client
        .start(RunStart {
            stdin: true,
            ..start(1, script)
        })
        .unwrap();
    let again = [0, 1, 2].map(|attempt| {
        let again = RunStart {
            stdin: true,
            ..start(attempt, script)
        };
        client.start(again).unwrap()
    });
    for again in &again {
        assert_eq!(again.accepted.slot_id, first.accepted.slot_id);
        assert_eq!(again.accepted.generation, first.accepted.generation);
    }
    for attempt in [0, 1, 2] {
        let other = client.start(start(attempt, "echo other")).err().unwrap();
        assert_eq!(other.code(), Code::AlreadyExists);
        assert!(other.message().contains(&run_id), "{other}");
    }

    client.send(&first, Input::Stdin("done\n".into()));
    let first = client.finish(first).unwrap();
    assert!(first.stdout().ends_with("\ndone\n"));
    for again in again {
        assert_eq!(client.finish(again).unwrap().stdout, first.stdout);
    }
    // A repeated request gets the result of the run.
    let again = client
        .run(RunStart {
            stdin: true,
            ..start(2, script)
        })
        .unwrap();
    assert_eq!(again.stdout, first.stdout);

    // A driver does not start a claim that it handles too late. The shim claims the run again.
    let holder = driver(&shim.state_dir());
    let late = std::thread::scope(|scope| {
        kill(holder, Signal::SIGSTOP).unwrap();
        let late = scope.spawn(|| shim.client().run(shell("anthropic", "echo late")));
        std::thread::park_timeout(START_BY + Duration::from_secs(1));
        kill(holder, Signal::SIGCONT).unwrap();
        late.join().unwrap().unwrap()
    });
    assert_eq!(late.stdout(), "late\n");
    let log = shim.process.log();
    assert!(log.contains("the claim came too late to start"), "{log}");
}

#[test]
fn what_a_driver_may_have_forgotten_runs_again_only_if_its_caller_says_so() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    // The run is older than the driver's journal, which does not contain it.
    let before = SystemTime::now() - Duration::from_secs(30 * 60);
    let before = before.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let time = uuid::Timestamp::from_unix(NoContext, before.as_secs(), 0);
    let again = RunStart {
        run_id: Uuid::new_v7(time).to_string(),
        attempt: 2,
        ..shell("anthropic", "echo twice")
    };
    let refused = client.run(again.clone()).unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    let details = refused.get_error_details();
    assert_eq!(details.error_info().unwrap().reason, "MAY_HAVE_RUN");
    let outcome = client
        .run(RunStart {
            accept_duplicate: true,
            ..again
        })
        .unwrap();
    assert_eq!(outcome.stdout(), "twice\n");
}

/// Closes a run at the driver of a state folder, as another try of the run would.
pub(crate) fn fence(state_dir: &Path, run_id: &str, attempt: u64) -> FenceResponse {
    let request = FenceRequest {
        run_id: run_id.to_owned(),
        ballot: Some(Ballot { attempt, nonce: 7 }),
        claims_on: String::new(),
        // As an older shim asks.
        user_id: String::new(),
    };
    let runtime = tokio::runtime::Runtime::new().expect("there are threads");
    let address = format!("unix://{}", state_dir.join("node.sock").display());
    let response = runtime.block_on(async {
        let mut node = NodeServiceClient::connect(address).await;
        let node = node.as_mut().expect("a driver listens");
        node.fence(request).await
    });
    response.expect("it answers").into_inner()
}

#[test]
fn a_try_that_another_has_fenced_off_asks_every_node_again() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let run_id = Uuid::now_v7().to_string();
    let fence = |attempt| fence(&shim.state_dir(), &run_id, attempt).answer.unwrap();
    assert!(matches!(fence(30), Answer::Fenced(ballot) if ballot.attempt == 30));
    // The answer to a lower ballot contains the highest one.
    assert!(matches!(fence(20), Answer::Fenced(ballot) if ballot.attempt == 30));
    let start = RunStart {
        run_id: run_id.clone(),
        attempt: 1,
        ..shell("anthropic", "echo once")
    };
    let outcome = client.run(start).unwrap();
    assert_eq!(outcome.stdout(), "once\n");
    assert!(
        shim.process
            .log()
            .contains("another try of the run has precedence")
    );
    assert!(matches!(fence(40), Answer::Have(have) if have.ended));
}
