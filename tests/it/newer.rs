//! A run that goes to a node that is newer than the run. An earlier try may have run elsewhere.

use std::{
    collections::HashMap,
    fs,
    time::{Duration, SystemTime},
};

use nix::sys::signal::{Signal, kill};
use polydev_proto::{node::fence_response::Answer, runtime::RunStart};
use polydev_tests::{
    client::{Client, Run, shell},
    cluster::Cluster,
    wait_until,
};
use tonic_types::StatusExt;
use uuid::{NoContext, Uuid};

use crate::{once::fence, survive::driver};

const OLDER: usize = 0;
const NEWER: usize = 1;

/// Restarts one node's driver without a journal, as on a new node. Runs that were made at the
/// returned time are older than the node.
pub(crate) fn a_node_begins_anew(cluster: &Cluster) -> SystemTime {
    let state_dir = cluster.state_dir(NEWER);
    let journal = state_dir.join("runs.journal");
    fs::remove_file(&journal).expect("a driver has begun it");
    let made = SystemTime::now();
    let before = driver(&state_dir);
    kill(before, Signal::SIGKILL).expect("a live process");
    wait_until("another driver", Duration::from_secs(60), || {
        match journal.exists() && driver(&state_dir) != before {
            true => Ok(()),
            false => Err(format!("{} has the node", driver(&state_dir))),
        }
    });
    made
}

/// Every slot is idle before and after the test.
pub(crate) fn a_run_that_is_older_than_its_node_runs_once(
    cluster: &Cluster,
    clients: &[Client; 3],
    made: SystemTime,
    slots: u32,
) {
    let made = made.duration_since(SystemTime::UNIX_EPOCH);
    let made = made.expect("a time after 1970");
    let older_id = || {
        let time = uuid::Timestamp::from_unix(NoContext, made.as_secs(), made.subsec_nanos());
        Uuid::new_v7(time).to_string()
    };
    let nodes = cluster.get("/v1/nodes");
    let nodes = nodes.as_array().into_iter().flatten();
    let ids: HashMap<&str, &str> = nodes
        .filter_map(|node| Some((node["Name"].as_str()?, node["ID"].as_str()?)))
        .collect();
    let newer = ids[format!("client{NEWER}").as_str()];

    // Only slots of the newer node are idle.
    let start = RunStart {
        stdin: true,
        ..shell("anthropic", "read line")
    };
    let runs = vec![start; slots as usize];
    let (runs, _) = clients[0].start_all(runs).expect("every slot is idle");
    let (ending, holding): (Vec<Run>, Vec<Run>) = runs
        .into_iter()
        .partition(|run| run.accepted.node_id == newer);
    let end = |runs: Vec<Run>| {
        for mut run in runs {
            run.close();
            clients[0].finish(run).expect("a clean end");
        }
    };
    end(ending);
    for client in clients {
        client.wait_idle("anthropic", slots / 2);
    }

    let once = |run_id: &str, attempt| RunStart {
        run_id: run_id.to_owned(),
        attempt,
        ..shell("anthropic", "echo once; cat /proc/sys/kernel/random/uuid")
    };
    let state_dir = cluster.state_dir(OLDER);
    let run_id = older_id();
    let first = clients[0].run(once(&run_id, 1)).expect("a whole run");
    assert_eq!(first.accepted.node_id, newer);
    // A shim that does not know the newer node learns of the run from the older node.
    let told = fence(&state_dir, &run_id, 50);
    assert!(matches!(told.answer, Some(Answer::Fenced(_))), "{told:?}");
    assert_eq!(told.claims_on, [newer]);
    let again = clients[1]
        .run(once(&run_id, 2))
        .expect("the result of the run");
    assert_eq!(again.stdout(), first.stdout());

    // Another try was at the older node, and may also have been at a node that is gone.
    let run_id = older_id();
    fence(&state_dir, &run_id, 50);
    let refused = clients[0].run(once(&run_id, 1));
    let refused = refused.expect_err("another try was there");
    let details = refused.get_error_details();
    assert_eq!(
        details.error_info().map(|info| info.reason.as_str()),
        Some("MAY_HAVE_RUN")
    );
    assert!(refused.message().contains(newer), "{refused}");

    end(holding);
    for client in clients {
        client.wait_idle("anthropic", slots);
    }
}
