//! Pools that are scaled, updated and drained under a real Nomad agent while runs continue.

use std::{
    collections::HashSet,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use polydev_proto::runtime::{ExitReason, RunStart};
use polydev_tests::{
    client::{Client, Run, shell},
    docker, job,
    nomad::Nomad,
    process::{output, succeed},
    program,
    shim::Shim,
    wait_until,
};
use serde_json::Value;

const JOB: &str = "polydev-pool-anthropic";

/// A run that continues until its caller closes its side.
fn open() -> RunStart {
    RunStart {
        stdin: true,
        ..shell("anthropic", "cat; echo done")
    }
}

#[track_caller]
fn ends_by_itself(client: &Client, mut run: Run) {
    run.close();
    let outcome = client.finish(run).expect("its node lives");
    assert_eq!(
        (outcome.stdout().as_str(), outcome.exited.exit_code),
        ("done\n", 0)
    );
}

/// Ten runs in a pool of ten, all requested within a millisecond.
fn filled_within_a_millisecond(client: &Client) -> Vec<Run> {
    wait_until("ten requests at once", Duration::from_secs(60), || {
        client.wait_idle("anthropic", 10);
        let (runs, took) = client
            .start_all(vec![open(); 10])
            .expect("there are ten slots");
        let slots: HashSet<&String> = runs.iter().map(|run| &run.accepted.slot_id).collect();
        assert_eq!(slots.len(), 10, "each has a slot of its own");
        if took <= Duration::from_millis(1) {
            return Ok(runs);
        }
        for run in runs {
            ends_by_itself(client, run);
        }
        Err(format!("they took {took:?}"))
    })
}

#[test]
fn a_pool_that_is_scaled_in_and_updated_ends_no_run_and_is_never_empty() {
    let nomad = Nomad::start();
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    nomad.submit_pool("anthropic", 10);
    client.wait_idle("anthropic", 10);

    let mut runs = filled_within_a_millisecond(&client);
    for run in runs.drain(5..) {
        ends_by_itself(&client, run);
    }
    scaled_in_under_runs_and_out_again(&shim, &client, runs);
    let image = Image::make();
    let long = client.start(open()).unwrap();
    updated_under_load(&nomad, &shim, &image);
    wait_until(
        "what is left of the old",
        Duration::from_secs(20),
        || match client.pool("anthropic") {
            pool if (pool.draining, pool.idle) == (1, 5) => Ok(()),
            pool => Err(format!("{pool:?}")),
        },
    );
    ends_by_itself(&client, long);
    client.wait_idle("anthropic", 5);
    nomad.run(&["job", "stop", "-detach", "-yes", JOB]);
    client.wait_idle("anthropic", 0);
    image.wait_unused();
}

/// Scales from ten slots to three during five runs, and then to five.
fn scaled_in_under_runs_and_out_again(shim: &Shim, client: &Client, runs: Vec<Run>) {
    let scale = |size: &str| {
        let mut command = Command::new(program("polydev-shim"));
        command.args(["pool", "scale", "anthropic", size]);
        succeed(command.env("POLYDEV_ADDRESS", &shim.address));
    };
    scale("3");
    wait_until("the slots that go", Duration::from_secs(60), || {
        let pool = client.pool("anthropic");
        if pool.idle + pool.claimed + pool.warming + pool.recycling == 3 {
            Ok(())
        } else {
            Err(format!("{pool:?}"))
        }
    });
    for run in runs {
        ends_by_itself(client, run);
    }
    client.wait_idle("anthropic", 3);
    scale("5");
    client.wait_idle("anthropic", 5);
}

/// Another image for slots.
struct Image(String);

impl Image {
    fn make() -> Self {
        let image = format!("pdtest-image-{:08x}:1", rand::random::<u32>());
        let made = docker::docker(&["create", "polydev-anthropic-runtime:latest"]);
        docker::docker(&["commit", "--change", "LABEL another=1", made.trim(), &image]);
        docker::docker(&["rm", made.trim()]);
        Self(image)
    }

    /// Removes the image, once no container uses it.
    fn wait_unused(self) {
        wait_until(
            "the image's last container",
            Duration::from_secs(30),
            || {
                let removed = output(docker::command().args(["rmi", &self.0]));
                if removed.status.success() {
                    Ok(())
                } else {
                    Err(String::from_utf8_lossy(&removed.stderr).into_owned())
                }
            },
        );
    }
}

/// Updates the pool while runs come as fast as this node refills, and watches the pool.
fn updated_under_load(nomad: &Nomad, shim: &Shim, image: &Image) {
    let old: Vec<Value> = nomad.wait_running(JOB, 5);
    let old: Vec<&str> = old.iter().map(job::id).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let (client, mut ran) = (shim.client(), 0);
            while !over.load(Ordering::Relaxed) {
                // On a busy machine refills take longer than runs, and it is not for the load
                // to take the last slot.
                if client.pool("anthropic").idle < 2 {
                    std::thread::park_timeout(Duration::from_millis(20));
                    continue;
                }
                let outcome = client.run(shell("anthropic", "sleep 1"));
                let outcome = outcome.expect("there is a slot");
                assert_eq!(outcome.exited.reason(), ExitReason::Exited);
                ran += 1;
            }
            ran
        });
        let watch = scope.spawn(|| {
            let (client, mut looked) = (shim.client(), 0);
            while !over.load(Ordering::Relaxed) {
                let pool = client.pool("anthropic");
                assert!(pool.idle > 0, "no idle slot: {pool:?}");
                looked += 1;
                std::thread::park_timeout(Duration::from_millis(5));
            }
            looked
        });
        let named = format!("image={}", image.0);
        let file = "jobspecs/pool-anthropic.nomad.hcl";
        nomad.run(&[
            "job", "run", "-detach", "-var", "count=5", "-var", &named, file,
        ]);
        wait_until("the new slots", Duration::from_secs(90), || {
            if load.is_finished() || watch.is_finished() {
                return Ok(());
            }
            let allocations = nomad.allocations(JOB);
            let wanted = allocations
                .iter()
                .filter(|alloc| alloc["DesiredStatus"] == "run");
            let new = wanted.clone().filter(|alloc| {
                alloc["ClientStatus"] == "running" && !old.contains(&job::id(alloc))
            });
            if (new.count(), wanted.count()) == (5, 5) {
                Ok(())
            } else {
                Err(format!("{allocations:?}"))
            }
        });
        over.store(true, Ordering::Relaxed);
        let ran = load.join().expect("every run had a slot");
        let looked = watch.join().expect("a slot was idle at each look");
        assert!(ran > 2 && looked > 20, "{ran} runs, {looked} looks");
    });
}

#[test]
fn a_drained_node_waits_for_its_runs_until_the_deadline() {
    let nomad = Nomad::start();
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    nomad.submit_pool("anthropic", 2);
    client.wait_idle("anthropic", 2);
    let drain = |state: &[&str]| {
        nomad.run(&[&["node", "drain", "-self", "-yes", "-detach"], state].concat())
    };
    let status = || nomad.get("/v1/nodes")[0]["LastDrain"]["Status"].clone();
    let drained = |limit| {
        wait_until("the drain's end", limit, || match status() {
            status if status == "complete" => Ok(()),
            status => Err(status.to_string()),
        });
    };

    let run = client.start(open()).unwrap();
    drain(&["-enable", "-deadline", "10m"]);
    wait_until(
        "a slot that drains",
        Duration::from_secs(30),
        || match client.pool("anthropic") {
            pool if (pool.draining, pool.idle) == (1, 0) => Ok(()),
            pool => Err(format!("{pool:?}")),
        },
    );
    assert_eq!(status(), "draining", "the run goes on");
    ends_by_itself(&client, run);
    drained(Duration::from_secs(30));

    nomad.run(&["node", "eligibility", "-self", "-enable"]);
    client.wait_idle("anthropic", 2);
    let run = client.start(open()).unwrap();
    drain(&["-enable", "-deadline", "5s"]);
    let outcome = client.finish(run).unwrap();
    assert_eq!(outcome.exited.reason(), ExitReason::Cancelled);
    let why = "it was cancelled: its node was drained, and the drain's deadline has passed";
    assert_eq!(outcome.exited.message, why);
    drained(Duration::from_secs(30));

    // A node that is closed for another reason keeps its runs.
    nomad.run(&["node", "eligibility", "-self", "-enable"]);
    client.wait_idle("anthropic", 2);
    let run = client
        .start(shell("anthropic", "sleep 4; echo lives"))
        .unwrap();
    nomad.run(&["node", "eligibility", "-self", "-disable"]);
    assert_eq!(client.finish(run).unwrap().stdout(), "lives\n");
}
