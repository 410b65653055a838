//! Pools under a real Nomad agent: what fills slots, and what keeps runs out of them.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use polydev_proto::runtime::RunStart;
use polydev_tests::{
    client::shell,
    docker,
    nomad::{Nomad, nomad_program},
    process::output,
    program, root,
    shim::{Shim, instance_label},
    wait_until,
};
use tonic::Code;

use crate::leases;

#[test]
fn a_run_that_the_node_has_no_room_for_waits_and_is_told_the_figures() {
    // What two runs take on top of their idle slots, and one idle container more.
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
    // Its next container, which is prepared ahead, has room.
    docker::wait_containers(&label, 4);
    let mut second = client.start(open()).unwrap();
    let full = client.run(shell("anthropic", "true")).unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted);
    for words in [
        "a run takes 400 MHz and 256 MiB of `run_headroom`, of which 0 MHz and 0 MiB are left",
        "1 are idle",
    ] {
        assert!(full.message().contains(words), "{full}");
    }
    let lease = leases::allocate(&client, 300).unwrap_err();
    assert_eq!(lease.code(), Code::ResourceExhausted, "{lease}");
    let prepared = docker::containers(&label);
    let prepared: Vec<_> = prepared.iter().filter(|id| !before.contains(id)).collect();
    assert_eq!(prepared.len(), 1, "that of the second had no room");
    // One that waits gets its turn when another has ended.
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

    // What is prepared for a slot that is not wanted any more goes before its run ends.
    let mut last = client.start(open()).unwrap();
    docker::wait_containers(&label, 4);
    nomad.run(&["job", "stop", "-detach", "-yes", "polydev-pool-anthropic"]);
    docker::wait_containers(&label, 1);
    last.close();
    client.finish(last).unwrap();
    docker::wait_containers(&label, 0);
}

#[test]
fn a_pool_is_scaled_by_the_shim_and_by_nomad_and_both_agree() {
    let nomad = Nomad::start();
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    let scale = |provider: &str, size: u32| {
        let mut command = Command::new(program("polydev-shim"));
        command.args(["pool", "scale", provider, &size.to_string()]);
        output(command.env("POLYDEV_ADDRESS", &shim.address))
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    for (provider, size, words) in [
        ("anthropic", 1, "Nomad has no job `polydev-pool-anthropic`"),
        ("anthropic", 101, "`size` is `101`, allowed are 0 to 100"),
        ("codecs", 1, "`provider`"),
    ] {
        let refused = scale(provider, size);
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
        let mut command = shim.command(&["pool"]);
        let refused = output(command.args(words));
        assert!(!refused.status.success(), "{words:?}");
        assert!(
            text(&refused.stderr).contains(told),
            "{}",
            text(&refused.stderr)
        );
    }

    let file = "jobspecs/pool-anthropic.nomad.hcl";
    let apply = |sizes: &[(&str, &str)], options: &[&str]| {
        let mut command = Command::new(program("polydev-shim"));
        command.args(["pool", "apply", "--file", file, "--nomad-addr"]);
        command.arg(&nomad.address).args(options);
        output(command.envs(sizes.iter().copied()).current_dir(root()))
    };
    for (size, words) in [
        (
            "101",
            "`WARM_POOL_ANTHROPIC_SIZE` is `101`, allowed are 0 to 100",
        ),
        ("one", "`WARM_POOL_ANTHROPIC_SIZE` is `one`"),
    ] {
        let refused = apply(&[("WARM_POOL_ANTHROPIC_SIZE", size)], &["--yes"]);
        assert_eq!(refused.status.code(), Some(125));
        assert!(
            text(&refused.stderr).contains(words),
            "{}",
            text(&refused.stderr)
        );
    }
    for (provider, size, planned) in [("openai", "0", ""), ("google", "2", "  pool: 2 Place\n")] {
        let mut command = Command::new(program("polydev-shim"));
        let file = format!("jobspecs/pool-{provider}.nomad.hcl");
        command.args(["pool", "apply", "--plan", "--file", &file, "--nomad-addr"]);
        command.env(format!("WARM_POOL_{}_SIZE", provider.to_uppercase()), size);
        let told = output(command.arg(&nomad.address).current_dir(root()));
        let plan = format!("polydev-pool-{provider}: new\n{planned}");
        assert_eq!(text(&told.stdout), plan, "{}", text(&told.stderr));
    }
    let unasked = apply(&[], &[]);
    assert!(text(&unasked.stderr).contains("--yes submits without asking"));
    assert!(text(&unasked.stdout).contains("polydev-pool-anthropic: new\n  pool: 10 Place\n"));
    let applied = apply(&[("WARM_POOL_ANTHROPIC_SIZE", "1")], &["--yes"]);
    let planned =
        "polydev-pool-anthropic: new\n  pool: 1 Place\npolydev-pool-anthropic: submitted\n";
    assert_eq!(text(&applied.stdout), planned, "{}", text(&applied.stderr));
    let job = "polydev-pool-anthropic";
    wait_until("its deployment", Duration::from_secs(20), || {
        match nomad.get(&format!("/v1/job/{job}/deployment")) {
            serde_json::Value::Null => Err("none"),
            _ => Ok(()),
        }
        .map_err(str::to_owned)
    });
    // Nomad takes no size while its slot becomes warm.
    let scaled = scale("anthropic", 3);
    let (stdout, stderr) = (text(&scaled.stdout), text(&scaled.stderr));
    assert_eq!(stdout, "anthropic: 1 -> 3\n", "{stderr}");
    assert!(stderr.contains("waiting for Nomad"), "{stderr}");
    client.wait_idle("anthropic", 3);

    let by_nomad = |size: &str| {
        let mut command = Command::new(nomad_program());
        command.args(["job", "scale", "-detach", "-address", &nomad.address]);
        output(command.args([job, "pool", size]))
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
    client.wait_idle("anthropic", 1);

    // The size it has is kept, whatever it was to be at first.
    let applied = apply(&[("WARM_POOL_ANTHROPIC_SIZE", "0")], &["--plan"]);
    let plan = text(&applied.stdout);
    assert!(
        plan.starts_with("polydev-pool-anthropic: ") && !plan.contains("Count"),
        "{plan}"
    );
    let applied = apply(&[], &["--plan", "--var", "image=other:1"]);
    let change =
        "pool.runtime.Config.slot[0][image]: \"polydev-anthropic-runtime:latest\" -> \"other:1\"";
    assert!(
        text(&applied.stdout).contains(change),
        "{}",
        text(&applied.stdout)
    );

    // Drained: no new run, and the one that goes on is waited for.
    let pool = |args: &[&str]| {
        let mut command = Command::new(program("polydev-shim"));
        command.arg("pool").args(args);
        command.env("POLYDEV_ADDRESS", &shim.address);
        command
    };
    let refused = output(&mut pool(&["resume", "anthropic"]));
    let told = text(&refused.stderr);
    assert!(
        told.contains("the pool of anthropic is not drained, it has 1 slots"),
        "{told}"
    );
    let open = RunStart {
        stdin: true,
        ..shell("anthropic", "cat")
    };
    let mut run = client.start(open).unwrap();
    let mut draining = pool(&["drain", "anthropic"]);
    draining.stdout(Stdio::piped()).stderr(Stdio::piped());
    let draining = draining.spawn().unwrap();
    wait_until("a slot that drains", Duration::from_secs(60), || {
        let shown = text(&output(&mut pool(&["show", "anthropic"])).stdout);
        let last = shown.lines().last().unwrap_or_default();
        if last.contains("draining") && last.contains(&run.accepted.run_id) {
            Ok(())
        } else {
            Err(shown)
        }
    });
    run.close();
    client.finish(run).unwrap();
    let drained = draining.wait_with_output().unwrap();
    assert_eq!(
        text(&drained.stdout),
        "anthropic: 1 -> 0\nanthropic: drained\n"
    );
    assert!(text(&drained.stderr).contains("anthropic: 1 slots are left, 1 with a run\n"));
    let again = output(&mut pool(&["drain", "anthropic"]));
    assert_eq!(text(&again.stdout), "anthropic: drained\n");

    let mut watching = pool(&["watch", "--output", "json"]);
    let mut watching = watching.stdout(Stdio::piped()).spawn().unwrap();
    let resumed = output(&mut pool(&["resume", "anthropic"]));
    assert_eq!(text(&resumed.stdout), "anthropic: 0 -> 1\n");
    client.wait_idle("anthropic", 1);
    let lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    let is_idle = |line: &str| line.contains("anthropic") && line.contains("\"idle\":1");
    assert!(lines.map_while(Result::ok).any(|line| is_idle(&line)));
    watching.kill().unwrap();
    watching.wait().unwrap();
    let scaled = scale("anthropic", 0);
    assert_eq!(text(&scaled.stdout), "anthropic: 1 -> 0\n");
    client.wait_idle("anthropic", 0);
}
