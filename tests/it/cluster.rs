//! Three shims over two nodes, each with a dockerd, a driver and a network of its own.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use polydev_proto::runtime::{
    ExitReason, GetClusterStatusRequest, ListPoolsRequest, ListRunsRequest, Node, RunStart,
    RunState, run_input::Input,
};
use polydev_tests::{
    client::{Client, Run, shell},
    cluster::{Cluster, NODES},
    shim::Shim,
    wait_until,
};
use serde_json::Value;
use uuid::Uuid;

use crate::newer;

const SLOTS: u32 = 6;
/// The offsets in stdout and stderr from which others continue a run.
const OFFSETS: [usize; 2] = [1000, 2];

#[test]
fn three_shims_over_two_nodes_give_each_run_one_container_whatever_dies() {
    let mut cluster = Cluster::start();
    let before = newer::a_node_begins_anew(&cluster);
    cluster.wait_healthy();
    let shims: [Shim; 3] = std::array::from_fn(|_| cluster.shim());
    let count = format!("count={SLOTS}");
    let file = "jobspecs/pool-anthropic.nomad.hcl";
    cluster.run(&["job", "run", "-detach", "-var", &count, file]);
    let clients = shims.each_ref().map(Shim::client);
    let wait_warm = || {
        for client in &clients {
            client.wait_idle("anthropic", SLOTS);
        }
    };
    wait_warm();
    drivers_let_in_shims_and_nobody_else(&cluster);
    newer::a_run_that_is_older_than_its_node_runs_once(&cluster, &clients, before, SLOTS);

    each_run_has_a_container_of_its_own(&shims);
    one_run_asked_for_three_times_at_once_runs_once(&cluster, &shims);
    wait_warm();

    let mut runs = a_run_in_every_slot_of_both_nodes(&clients);
    all_are_listed_by_any_shim(&clients, &runs);
    the_nodes_are_told_of(&clients[0], SLOTS);
    let attached = others_attach_through_another_shim(&clients, &runs);
    a_run_is_cancelled_and_its_slot_refilled_without_a_server(&cluster, &clients, runs.remove(0));
    clients[0].wait_idle("anthropic", 1);
    runs_end_and_stream_without_dockerd(&mut cluster, &clients, runs, attached);

    for engine in &mut cluster.engines {
        engine.restart();
    }
    wait_warm();
    for number in 0..NODES {
        wait_until("half of the containers", Duration::from_secs(30), || {
            let ids = cluster.containers(number, "{{.ID}}");
            if ids.len() == SLOTS as usize / NODES {
                Ok(())
            } else {
                Err(format!("{ids:?}"))
            }
        });
    }
}

/// Runs that each start through another shim, and wait for a line in the middle of their output.
fn a_run_in_every_slot_of_both_nodes(clients: &[Client; 3]) -> Vec<Run> {
    let script = "trap '' TERM; echo error >&2; \
        seq 1 20000; read line; echo $line; seq 20001 40000";
    let open = || RunStart {
        stdin: true,
        kill_timeout: Some(prost_types::Duration {
            seconds: 1,
            nanos: 0,
        }),
        ..shell("anthropic", script)
    };
    let start = |number: usize| clients[number % 3].start(open()).expect("a slot is idle");
    let runs: Vec<Run> = (0..SLOTS as usize).map(start).collect();
    let nodes = runs.iter().map(|run| &run.accepted.node_id);
    assert_eq!(nodes.collect::<HashSet<_>>().len(), 2);
    runs
}

/// Attaches to all runs but the first, in the middle of both streams.
fn others_attach_through_another_shim(clients: &[Client; 3], runs: &[Run]) -> Vec<Run> {
    let attach = |number: usize| {
        let run_id = &runs[number].accepted.run_id;
        let attached = clients[(number + 1) % 3].attach(run_id, OFFSETS);
        attached.expect("any shim knows it")
    };
    (1..runs.len()).map(attach).collect()
}

/// The run ignores SIGTERM.
fn a_run_is_cancelled_and_its_slot_refilled_without_a_server(
    cluster: &Cluster,
    clients: &[Client; 3],
    run: Run,
) {
    cluster.server.signal(Signal::SIGSTOP);
    let began = Instant::now();
    let cancelled = clients[1].cancel(&run.accepted.run_id);
    cancelled.expect("any shim may cancel it");
    let outcome = clients[0].finish(run).expect("a clean end");
    assert_eq!(outcome.exited.reason(), ExitReason::Cancelled);
    assert_eq!(outcome.exited.signal, 9);
    let took = began.elapsed();
    assert!(
        took < Duration::from_secs(15),
        "{took:?} with a second to end in, not 30"
    );
    clients[2].wait_idle("anthropic", 1);
    let outcome = clients[2].run(shell("anthropic", "echo on"));
    assert_eq!(outcome.expect("its slot is warm").stdout(), "on\n");
    cluster.server.signal(Signal::SIGCONT);
}

/// No dockerd runs on either node.
fn runs_end_and_stream_without_dockerd(
    cluster: &mut Cluster,
    clients: &[Client; 3],
    runs: Vec<Run>,
    attached: Vec<Run>,
) {
    for engine in &mut cluster.engines {
        engine.kill();
    }
    let outcome = clients[1].run(shell("anthropic", "echo on"));
    let outcome = outcome.expect("a slot is warm");
    assert_eq!(outcome.stdout(), "on\n", "a warm claim needs no dockerd");
    let lines =
        |from: u32, to: u32| -> String { (from..=to).map(|line| format!("{line}\n")).collect() };
    let expected = lines(1, 20_000) + "further\n" + &lines(20_001, 40_000);
    for (number, mut run) in runs.into_iter().enumerate() {
        let run_id = run.accepted.run_id.clone();
        let written = Input::Stdin(b"further\n".to_vec().into());
        clients[0].send(&run, written);
        run.close();
        let outcome = clients[0].finish(run).expect("a clean end");
        assert!(outcome.stdout() == expected, "{run_id}");
        assert_eq!(outcome.exited.exit_code, 0);
        let other = &clients[(number + 1) % 3];
        let again = other.attach(&run_id, [0; 2]).expect("any shim knows it");
        let again = other.finish(again).expect("an ended run");
        assert!(again.stdout() == expected, "{run_id} through another shim");
    }
    for (number, run) in attached.into_iter().enumerate() {
        let tail = clients[(number + 2) % 3].finish_from(run, OFFSETS);
        let tail = tail.expect("an ended run");
        assert!(tail.stdout() == expected[OFFSETS[0]..]);
        assert_eq!(tail.stderr(), "error\n"[OFFSETS[1]..]);
    }
}

/// The drivers of both nodes accept only the certificate of a shim.
fn drivers_let_in_shims_and_nobody_else(cluster: &Cluster) {
    // An agent collects changes of a driver that has begun anew for up to ten seconds.
    wait_until("the drivers' addresses", Duration::from_secs(20), || {
        let nodes = cluster.get("/v1/nodes");
        let mut all = nodes.as_array().into_iter().flatten();
        let has_address = |node: &Value| {
            let told = &node["Drivers"]["polydev"]["Attributes"];
            let address = told["driver.polydev.node_address"].as_str();
            address.is_some_and(|address| address.starts_with("https://10."))
        };
        let is_told = all.all(has_address);
        is_told.then_some(()).ok_or(nodes.to_string())
    });
    // The same authority has signed the certificate of the caller.
    let caller = cluster.shim_as("controller");
    let client = caller.client();
    wait_until(
        "two nodes that cannot be reached",
        Duration::from_secs(20),
        || {
            let request = ListPoolsRequest::default();
            let pools = client.call(async |mut shim| shim.list_pools(request).await);
            let pools = pools.map_err(|status| status.to_string())?;
            assert_eq!(pools.nodes_connected, 0, "accepted");
            match pools.nodes_unreachable {
                2 => Ok(()),
                nodes => Err(format!("{nodes}")),
            }
        },
    );
    wait_until("the reason", Duration::from_secs(20), || {
        match caller.process.log().contains("cannot reach a driver") {
            true => Ok(()),
            false => Err(caller.process.log()),
        }
    });
}

/// Two nodes with three slots each, and the headroom that their runs leave.
fn the_nodes_are_told_of(client: &Client, runs: u32) {
    let request = GetClusterStatusRequest {};
    let status = client.call(async |mut shim| shim.get_cluster_status(request).await);
    let status = status.expect("it is told");
    assert_eq!(status.nodes.len(), NODES);
    assert!(status.nodes.iter().all(|node| node.reachable));
    let sum = |of: fn(&Node) -> u32| status.nodes.iter().map(of).sum::<u32>();
    assert_eq!(
        (sum(|node| node.slots), sum(|node| node.runs)),
        (SLOTS, runs)
    );
    for node in &status.nodes {
        let (Some(run), Some(given), Some(left)) = (node.run, node.headroom, node.headroom_left)
        else {
            panic!("{node:?}");
        };
        assert_eq!((given.cpu_mhz, given.memory_mb), (8000, 8192));
        // An idle slot has 100 MHz of its own.
        assert_eq!(
            left.cpu_mhz,
            given.cpu_mhz - node.runs * (run.cpu_mhz - 100)
        );
        assert_eq!(node.driver_version, status.shim_version);
    }
}

fn all_are_listed_by_any_shim(clients: &[Client; 3], runs: &[Run]) {
    let mut expected: Vec<_> = runs.iter().map(|run| &run.accepted.run_id).collect();
    expected.sort_unstable_by(|a, b| b.cmp(a));
    for client in clients {
        let mut request = ListRunsRequest {
            // The command of an accepted run may not have started yet.
            states: vec![RunState::Claimed.into(), RunState::Running.into()],
            page_size: 1,
            ..Default::default()
        };
        for (number, run_id) in expected.iter().enumerate() {
            let page = client.list_runs(request.clone()).expect("runs are listed");
            assert!(page.nodes_unreachable.is_empty());
            let [listed] = &page.runs[..] else {
                panic!("{page:?}")
            };
            assert_eq!(listed.run_id, **run_id, "{number}");
            request.page_token = page.next_page_token;
        }
        assert_eq!(request.page_token, "", "all have been listed");
    }
}

/// Far more runs than slots, through all shims at once.
fn each_run_has_a_container_of_its_own(shims: &[Shim; 3]) {
    let start = RunStart {
        queue_timeout: Some(prost_types::Duration {
            seconds: 60,
            nanos: 0,
        }),
        ..shell("anthropic", "hostname")
    };
    let name = |client: &Client| client.run(start.clone()).map(|run| run.stdout());
    let name = &name;
    let names: Vec<String> = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..12)
            .map(|number| {
                scope.spawn(move || {
                    let client = shims[number % 3].client();
                    [(); 2].map(|()| name(&client).expect("a slot in time"))
                })
            })
            .collect();
        let names = callers
            .into_iter()
            .map(|caller| caller.join().expect("no panic"));
        names.flatten().collect()
    });
    assert_eq!(names.iter().collect::<HashSet<_>>().len(), 24, "{names:?}");
}

/// All callers that learn the result of the command learn the same result.
fn one_run_asked_for_three_times_at_once_runs_once(cluster: &Cluster, shims: &[Shim; 3]) {
    for _ in 0..3 {
        let run_id = Uuid::now_v7().to_string();
        let told: Vec<Result<String, tonic::Status>> = std::thread::scope(|scope| {
            let callers: Vec<_> = (1..)
                .zip(shims)
                .map(|(attempt, shim)| {
                    let start = RunStart {
                        run_id: run_id.clone(),
                        attempt,
                        ..shell("anthropic", "cat /proc/sys/kernel/random/uuid; sleep 0.3")
                    };
                    scope.spawn(move || shim.client().run(start).map(|run| run.stdout()))
                })
                .collect();
            callers
                .into_iter()
                .map(|caller| caller.join().expect("no panic"))
                .collect()
        });
        let ran: HashSet<&String> = told.iter().flatten().collect();
        assert_eq!(ran.len(), 1, "{told:?}");
        let started = |number| {
            let journal = cluster.state_dir(number).join("runs.journal");
            let journal = std::fs::read_to_string(journal).expect("a driver has a journal");
            let is_start =
                |line: &&str| line.contains(r#""record":"started""#) && line.contains(&run_id);
            journal.lines().filter(is_start).count()
        };
        assert_eq!(started(0) + started(1), 1, "{told:?}");
    }
}
