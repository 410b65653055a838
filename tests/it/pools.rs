//! Pools under a real Nomad agent: how slots are filled, and when they take no runs.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use polydev_proto::runtime::{RunStart, run_event::Event, run_input::Input};
use polydev_tests::{
    client::{Client, Run, shell},
    docker,
    nomad::{Nomad, nomad_program},
    process::output,
    program, root,
    shim::{Shim, instance_label},
    wait_until,
};
use tonic::Code;

use crate::{leases, survive};

const JOB: &str = "polydev-pool-anthropic";
const FILE: &str = "jobspecs/pool-anthropic.nomad.hcl";

#[test]
fn a_run_that_the_node_has_no_room_for_waits_and_is_told_the_figures() {
    // Headroom for two runs beside their idle slots, and for one more idle container.
    let nomad = Nomad::start_with("run_headroom {\n cpu = 900\n memory = 768\n}");
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    nomad.submit_pool_with("anthropic", 3, "prepare_ahead=true");
    client.wait_idle("anthropic", 3);
    let label = instance_label(&nomad.state_dir());
    let open = || RunStart {
        stdin: true,
        ..shell("anthropic", "cat")
    };
    let before = docker::containers(&label);
    let mut first = client.start(open()).unwrap();
    // The slot's next container, which is prepared ahead, has room.
    docker::wait_containers(&label, 4);
    let mut second = client.start(open()).unwrap();
    let full = client.run(shell("anthropic", "true")).unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted);
    for words in [
        "a run needs 400 MHz and 256 MiB of `run_headroom`, which has 0 MHz and 0 MiB left",
        "1 are idle",
    ] {
        assert!(full.message().contains(words), "{full}");
    }
    let lease = leases::allocate(&client, 300).unwrap_err();
    assert_eq!(lease.code(), Code::ResourceExhausted, "{lease}");
    let prepared = docker::containers(&label);
    let prepared: Vec<_> = prepared.iter().filter(|id| !before.contains(id)).collect();
    assert_eq!(prepared.len(), 1, "that of the second had no room");
    // A waiting run gets its turn when another run has ended.
    let refusals = || {
        shim.process
            .log()
            .matches("no room for another run")
            .count()
    };
    let refused = refusals();
    std::thread::scope(|scope| {
        let third = scope.spawn(|| shim.client().run(shell("anthropic", "echo turn")));
        wait_until("a refusal", Duration::from_secs(5), || {
            let now = refusals();
            if now > refused {
                Ok(())
            } else {
                Err(now.to_string())
            }
        });
        second.close();
        client.finish(second).unwrap();
        assert_eq!(third.join().unwrap().unwrap().stdout(), "turn\n");
    });
    client.wait_idle("anthropic", 2);
    first.close();
    client.finish(first).unwrap();
    client.wait_idle("anthropic", 3);
    assert!(docker::wait_containers(&label, 3).contains(prepared[0]));

    // The container prepared for an unwanted slot is removed before the slot's run ends.
    let mut last = client.start(open()).unwrap();
    docker::wait_containers(&label, 4);
    nomad.run(&["job", "stop", "-detach", "-yes", JOB]);
    docker::wait_containers(&label, 1);
    last.close();
    client.finish(last).unwrap();
    docker::wait_containers(&label, 0);
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// An agent, and a shim in front of it.
struct Site {
    client: Client,
    shim: Shim,
    nomad: Nomad,
}

impl Site {
    fn start() -> Self {
        let nomad = Nomad::start();
        let shim = Shim::serve(&nomad.address);
        Self {
            client: shim.client(),
            shim,
            nomad,
        }
    }

    /// Runs `polydev-shim pool ARGS`.
    fn pool(&self, args: &[&str]) -> Command {
        let mut command = self.shim.command(&["pool"]);
        command.args(args);
        command
    }

    fn scale(&self, provider: &str, size: u32) -> Output {
        output(&mut self.pool(&["scale", provider, &size.to_string()]))
    }

    /// Runs `polydev-shim pool apply` with [`FILE`], and with a size in the environment.
    fn apply(&self, size: Option<&str>, options: &[&str]) -> Output {
        let mut command = self.apply_file(FILE);
        command.args(options);
        command.envs(size.map(|size| ("WARM_POOL_ANTHROPIC_SIZE", size)));
        output(&mut command)
    }

    fn apply_file(&self, file: &str) -> Command {
        let mut command = Command::new(program("polydev-shim"));
        command.args(["pool", "apply", "--file", file, "--nomad-addr"]);
        command.arg(&self.nomad.address).current_dir(root());
        command
    }
}

/// Prints the CPU quota, and again for each line of stdin.
const QUOTA: &str = "quota() { if [ -e cpu.max ]; then cut -d' ' -f1 cpu.max; \
    else cat cpu/cpu.cfs_quota_us; fi; }; \
    cd /sys/fs/cgroup; quota; while read line; do quota; done";

#[test]
fn a_run_has_more_cpu_at_its_start_if_the_node_has_it() {
    // Two runs beside their idle slots, and one boost.
    let config = "run_class {\n start_boost {\n cpu = 900\n time = \"4s\"\n }\n}\n\
                  run_headroom {\n cpu = 1200\n memory = 512\n}";
    let nomad = Nomad::start_with(config);
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    nomad.submit_pool("anthropic", 2);
    client.wait_idle("anthropic", 2);
    let start = || {
        let run = RunStart {
            stdin: true,
            ..shell("anthropic", QUOTA)
        };
        client.start(run).unwrap()
    };
    let quota = |run: &mut Run| loop {
        match client.next(run).unwrap() {
            Some(Event::Stdout(output)) => break output.data,
            Some(_) => {}
            None => panic!("the run has ended"),
        }
    };
    let becomes_lower = |run: &mut Run| {
        wait_until("the end of the boost", Duration::from_secs(20), || {
            client.send(run, Input::Stdin("\n".into()));
            match quota(run) {
                lower if lower == "50000\n" => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    };
    let mut first = start();
    assert_eq!(quota(&mut first), "90000\n");
    // Docker has been told of the run's limits by then.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(1) {
        client.send(&first, Input::Stdin("\n".into()));
        assert_eq!(quota(&mut first), "90000\n");
    }
    let mut second = start();
    assert_eq!(quota(&mut second), "50000\n", "there is no room for it");
    becomes_lower(&mut first);
    for mut run in [first, second] {
        run.close();
        while !matches!(client.next(&mut run).unwrap(), Some(Event::Exited(_))) {}
    }
    // A driver that is killed does not end it, and the next one does.
    client.wait_idle("anthropic", 2);
    let mut third = start();
    assert_eq!(quota(&mut third), "90000\n");
    survive::kill_driver(&nomad);
    becomes_lower(&mut third);
}

#[test]
fn a_pool_is_scaled_by_the_shim_and_by_nomad_and_both_agree() {
    let site = Site::start();
    unknown_pools_and_wrong_sizes_are_refused(&site);
    wrong_sizes_in_the_environment_are_refused(&site);
    a_plan_is_shown_and_submitted_only_if_asked(&site);
    a_size_is_taken_after_the_deployment(&site);
    nomads_own_command_scales_within_the_same_bounds(&site);
    a_plan_keeps_the_size_of_a_pool(&site);
    a_drain_waits_for_the_run_in_its_slot(&site);
    a_drained_pool_is_resumed_and_watched(&site);
}

fn unknown_pools_and_wrong_sizes_are_refused(site: &Site) {
    for (provider, size, words) in [
        ("anthropic", 1, "Nomad has no job `polydev-pool-anthropic`"),
        ("anthropic", 101, "`size` is `101`; must be 0 to 100"),
        ("codecs", 1, "`provider`"),
    ] {
        let refused = site.scale(provider, size);
        assert_eq!(refused.status.code(), Some(125));
        let told = text(&refused.stderr);
        assert!(told.contains(words), "{told}");
    }
    for (words, told) in [
        (&["scale", "anthropic", "--", "-1"][..], "'-1'"),
        (&["drain", "codecs"], "`provider`"),
        (&["resume", "codecs"], "`provider`"),
        (&["show", "codecs"], "`provider`"),
        (
            &["drain", "google"],
            "Nomad has no job `polydev-pool-google`",
        ),
        (
            &["resume", "google"],
            "Nomad has no job `polydev-pool-google`",
        ),
    ] {
        let refused = output(&mut site.pool(words));
        assert!(!refused.status.success(), "{words:?}");
        assert!(
            text(&refused.stderr).contains(told),
            "{}",
            text(&refused.stderr)
        );
    }
}

fn wrong_sizes_in_the_environment_are_refused(site: &Site) {
    for (size, words) in [
        (
            "101",
            "`WARM_POOL_ANTHROPIC_SIZE` is `101`; must be 0 to 100",
        ),
        ("one", "`WARM_POOL_ANTHROPIC_SIZE` is `one`"),
    ] {
        let refused = site.apply(Some(size), &["--yes"]);
        assert_eq!(refused.status.code(), Some(125));
        assert!(
            text(&refused.stderr).contains(words),
            "{}",
            text(&refused.stderr)
        );
    }
}

fn a_plan_is_shown_and_submitted_only_if_asked(site: &Site) {
    for (provider, size, planned) in [("openai", "0", ""), ("google", "2", "  pool: 2 Place\n")] {
        let mut command = site.apply_file(&format!("jobspecs/pool-{provider}.nomad.hcl"));
        command.env(format!("WARM_POOL_{}_SIZE", provider.to_uppercase()), size);
        let told = output(command.arg("--plan"));
        let plan = format!("polydev-pool-{provider}: new\n{planned}");
        assert_eq!(text(&told.stdout), plan, "{}", text(&told.stderr));
    }
    let unasked = site.apply(None, &[]);
    assert!(text(&unasked.stderr).contains("--yes submits without a confirmation"));
    assert!(text(&unasked.stdout).contains("polydev-pool-anthropic: new\n  pool: 10 Place\n"));
    let applied = site.apply(Some("1"), &["--yes"]);
    let planned =
        "polydev-pool-anthropic: new\n  pool: 1 Place\npolydev-pool-anthropic: submitted\n";
    assert_eq!(text(&applied.stdout), planned, "{}", text(&applied.stderr));
}

fn a_size_is_taken_after_the_deployment(site: &Site) {
    wait_until("its deployment", Duration::from_secs(20), || {
        match site.nomad.get(&format!("/v1/job/{JOB}/deployment")) {
            serde_json::Value::Null => Err("none"),
            _ => Ok(()),
        }
        .map_err(str::to_owned)
    });
    // Nomad accepts no size while the pool's slot becomes warm.
    let scaled = site.scale("anthropic", 3);
    let (stdout, stderr) = (text(&scaled.stdout), text(&scaled.stderr));
    assert_eq!(stdout, "anthropic: 1 -> 3\n", "{stderr}");
    assert!(stderr.contains("waiting until Nomad"), "{stderr}");
    site.client.wait_idle("anthropic", 3);
}

fn nomads_own_command_scales_within_the_same_bounds(site: &Site) {
    let by_nomad = |size: &str| {
        let mut command = Command::new(nomad_program());
        command.args(["job", "scale", "-detach", "-address", &site.nomad.address]);
        output(command.args([JOB, "pool", size]))
    };
    let beyond = by_nomad("101");
    let told = text(&beyond.stderr);
    assert!(
        !beyond.status.success() && told.contains("scaling policy maximum"),
        "{told}"
    );
    wait_until("Nomad's own command", Duration::from_secs(60), || {
        let scaled = by_nomad("1");
        if scaled.status.success() {
            Ok(())
        } else {
            Err(text(&scaled.stderr))
        }
    });
    site.client.wait_idle("anthropic", 1);
}

/// With any size for a new pool in the environment or the file.
fn a_plan_keeps_the_size_of_a_pool(site: &Site) {
    let applied = site.apply(Some("0"), &["--plan"]);
    let plan = text(&applied.stdout);
    assert!(
        plan.starts_with("polydev-pool-anthropic: ") && !plan.contains("Count"),
        "{plan}"
    );
    let applied = site.apply(None, &["--plan", "--var", "image=other:1"]);
    let change =
        "pool.runtime.Config.slot[0][image]: \"polydev-anthropic-runtime:latest\" -> \"other:1\"";
    assert!(
        text(&applied.stdout).contains(change),
        "{}",
        text(&applied.stdout)
    );
}

fn a_drain_waits_for_the_run_in_its_slot(site: &Site) {
    let refused = output(&mut site.pool(&["resume", "anthropic"]));
    let told = text(&refused.stderr);
    assert!(
        told.contains("the pool of anthropic is not drained: it has 1 slots"),
        "{told}"
    );
    let open = RunStart {
        stdin: true,
        ..shell("anthropic", "cat")
    };
    let mut run = site.client.start(open).expect("a slot is idle");
    let mut draining = site.pool(&["drain", "anthropic"]);
    draining.stdout(Stdio::piped()).stderr(Stdio::piped());
    let draining = draining.spawn().expect("a built program");
    wait_until("a slot that drains", Duration::from_secs(60), || {
        let shown = text(&output(&mut site.pool(&["show", "anthropic"])).stdout);
        let last = shown.lines().last().unwrap_or_default();
        if last.contains("draining") && last.contains(&run.accepted.run_id) {
            Ok(())
        } else {
            Err(shown)
        }
    });
    run.close();
    site.client.finish(run).expect("a clean end");
    let drained = draining.wait_with_output().expect("a clean end");
    assert_eq!(
        text(&drained.stdout),
        "anthropic: 1 -> 0\nanthropic: drained\n"
    );
    assert!(text(&drained.stderr).contains("anthropic: 1 slots are left, 1 with a run\n"));
    let again = output(&mut site.pool(&["drain", "anthropic"]));
    assert_eq!(text(&again.stdout), "anthropic: drained\n");
}

fn a_drained_pool_is_resumed_and_watched(site: &Site) {
    let mut watching = site.pool(&["watch", "--output", "json"]);
    let watching = watching.stdout(Stdio::piped()).spawn();
    let mut watching = watching.expect("a built program");
    let resumed = output(&mut site.pool(&["resume", "anthropic"]));
    assert_eq!(text(&resumed.stdout), "anthropic: 0 -> 1\n");
    site.client.wait_idle("anthropic", 1);
    let lines = BufReader::new(watching.stdout.take().expect("it is piped")).lines();
    let is_idle = |line: &str| line.contains("anthropic") && line.contains("\"idle\":1");
    assert!(lines.map_while(Result::ok).any(|line| is_idle(&line)));
    watching.kill().expect("still running");
    watching.wait().expect("a clean end");
    let scaled = site.scale("anthropic", 0);
    assert_eq!(text(&scaled.stdout), "anthropic: 1 -> 0\n");
    site.client.wait_idle("anthropic", 0);
}
