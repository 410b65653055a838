//! A run under a real Nomad agent from start to end, and what Nomad sees of the run.

use std::{fs, process::Command, time::Duration};

use polydev_stand_in::Text;
use polydev_tests::{
    client::{prompt, shell},
    docker, fresh_key,
    host::Host,
    nomad::Nomad,
    process::{Process, output},
    shim::{Shim, instance_label},
    wait_until,
};

use crate::secrets;

/// The header in which each provider's CLI presents its key.
const HEADERS: [(&str, &str, &str); 3] = [
    ("openai", "authorization", "Bearer "),
    ("anthropic", "x-api-key", ""),
    ("google", "x-goog-api-key", ""),
];

#[test]
fn the_real_clis_answer_with_their_users_keys_which_stay_nowhere() {
    let host = Host::start();
    let nomad = Nomad::start();
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    let label = instance_label(&nomad.state_dir());
    let (mut keys, mut seen) = (Vec::new(), secrets::Seen::default());

    for (provider, header, prefix) in HEADERS {
        let job = format!("polydev-pool-{provider}");
        nomad.submit_pool(provider, 2);
        let before = nomad.wait_running(&job, 2);
        client.wait_idle(provider, 2);
        let containers = docker::containers(&label);

        let key = fresh_key();
        let text = format!("What is {}?", fresh_key());
        // While the CLI runs with the key, the test searches everything around the CLI.
        let looked = seen.alive;
        let outcome = std::thread::scope(|scope| {
            let run = scope.spawn(|| shim.client().run(prompt(provider, &text, &key, &host.url)));
            while !run.is_finished() {
                seen.look(&label, &key);
            }
            run.join().unwrap().unwrap()
        });
        assert!(
            seen.alive > looked,
            "nobody looked while the CLI had its key"
        );
        assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
        let answer = format!("sha256 {}", Text::of(&text).sha256);
        assert!(
            outcome.stdout().contains(&answer),
            "{}\n{}",
            outcome.stdout(),
            outcome.stderr()
        );

        let asked: Vec<_> = host
            .requests()
            .into_iter()
            .filter(|request| request.texts.contains(&Text::of(&text)))
            .collect();
        assert!(!asked.is_empty());
        for request in asked {
            assert_eq!(request.credentials[header], format!("{prefix}{key}"));
        }
        keys.push(key);

        // The container is gone. Its slot is warm again, in the same allocation.
        client.wait_idle(provider, 2);
        let now = docker::wait_containers(&label, containers.len());
        assert_eq!(now.iter().filter(|id| !containers.contains(id)).count(), 1);
        let ids = |list: &[serde_json::Value]| -> Vec<String> {
            list.iter().map(|alloc| alloc["ID"].to_string()).collect()
        };
        let after = nomad.wait_running(&job, 2);
        assert_eq!(ids(&after), ids(&before));
        let alloc_id = outcome
            .accepted
            .slot_id
            .rsplit('/')
            .next()
            .unwrap()
            .to_owned();
        assert!(ids(&after).contains(&format!("\"{alloc_id}\"")));

        let status = nomad.run(&["alloc", "status", &alloc_id]);
        let image = format!("Warm: image polydev-{provider}-runtime:latest");
        for told in [
            &*image,
            "100 MHz, 256 MiB, 5 Mbit/s",
            "500 MHz, 512 MiB, 10 Mbit/s",
            "Started",
        ] {
            assert!(status.contains(told), "no `{told}` in\n{status}");
        }
        let events = after
            .iter()
            .map(|alloc| &alloc["TaskStates"]["runtime"]["Events"]);
        for events in events {
            assert_eq!(
                events.as_array().unwrap().len(),
                4,
                "an event for a run? {events}"
            );
        }
        nomad.run(&["job", "stop", "-detach", "-yes", &job]);
        client.wait_idle(provider, 0);
    }

    prove_the_search(&nomad, &shim);
    for key in keys {
        let found = secrets::find(&key, &nomad, &shim, &seen);
        assert!(found.is_empty(), "the key is in {found:?}");
    }
}

/// Plants a key in every place of the search, and finds it in each.
fn prove_the_search(nomad: &Nomad, shim: &Shim) {
    let key = fresh_key();
    let planted = nomad.folder().join("data/planted");
    fs::write(&planted, format!("x{}y", hex::encode(&key))).expect("a file can be written");
    let in_state = nomad.state_dir().join("planted");
    fs::write(&in_state, &key).expect("a file can be written");
    nomad.run(&["var", "put", "planted", &format!("key={key}")]);
    let variable = format!("KEY={key}");
    let image = "polydev-openai-runtime:latest";
    let echo = [
        "run",
        "--detach",
        "-e",
        &variable,
        image,
        "sh",
        "-c",
        "echo $KEY | base64 -w0",
    ];
    let container = docker::docker(&echo).trim().to_owned();
    docker::docker(&["wait", &container]);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut sleeper = Command::new("sh");
    sleeper.args(["-c", "sleep 1000; :", "sh", &key]);
    let _process = Process::start(&mut sleeper, &folder.path().join("log"));

    // A process exists before it has its new command line.
    let places = wait_until("the planted keys", Duration::from_secs(20), || {
        let mut now = secrets::Seen::default();
        now.look(&instance_label(&nomad.state_dir()), &key);
        let places = secrets::find(&key, nomad, shim, &now);
        let process = places.iter().any(|place| place.ends_with("/cmdline"));
        if process {
            Ok(places)
        } else {
            Err(format!("{places:?}"))
        }
    });
    let short = &container[..12];
    for place in [
        format!("file {}", planted.display()),
        format!("file {}", in_state.display()),
        "Nomad's API /v1/var/planted".to_owned(),
        format!("docker inspect {short}"),
        format!("docker logs {short}"),
    ] {
        assert!(places.contains(&place), "no `{place}` in {places:?}");
    }
    docker::docker(&["rm", "--force", &container]);
}

#[test]
fn slots_follow_nomad_and_are_their_users_alone() {
    let nomad = Nomad::start();
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    nomad.submit_pool("anthropic", 2);
    let before = nomad.wait_running("polydev-pool-anthropic", 2);
    client.wait_idle("anthropic", 2);

    // Exec and signals would give every Nomad user with these rights access to a user's container.
    let alloc_id = before[0]["ID"].as_str().unwrap();
    for args in [
        &["alloc", "exec", "-t=false", alloc_id, "true"][..],
        &["alloc", "signal", alloc_id],
    ] {
        let refused = output(&mut nomad.command(args));
        assert!(!refused.status.success());
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            told.contains("the container of a warm slot is its user's alone"),
            "{told}"
        );
    }

    let label = instance_label(&nomad.state_dir());
    // Nomad refuses to scale a job during a deployment of the job.
    wait_until("a pool that is scaled", Duration::from_secs(60), || {
        let args = [
            "job",
            "scale",
            "-detach",
            "polydev-pool-anthropic",
            "pool",
            "1",
        ];
        let scaled = output(&mut nomad.command(&args));
        let told = String::from_utf8_lossy(&scaled.stderr).into_owned();
        if scaled.status.success() {
            Ok(())
        } else {
            Err(told)
        }
    });
    client.wait_idle("anthropic", 1);
    nomad.run(&["job", "stop", "-detach", "-yes", "polydev-pool-anthropic"]);
    wait_until("no container", Duration::from_secs(30), || {
        let left = docker::containers(&label);
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
}

#[test]
fn stopping_a_claimed_slot_lets_its_run_end() {
    let nomad = Nomad::start();
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    nomad.submit_pool("anthropic", 1);
    nomad.wait_running("polydev-pool-anthropic", 1);
    client.wait_idle("anthropic", 1);
    let mut run = client
        .start(polydev_proto::runtime::RunStart {
            stdin: true,
            ..shell("anthropic", "read line; echo $line")
        })
        .unwrap();
    nomad.run(&["job", "stop", "-detach", "-yes", "polydev-pool-anthropic"]);
    wait_until("a draining slot", Duration::from_secs(20), || {
        let pool = client.pool("anthropic");
        if pool.draining == 1 {
            Ok(())
        } else {
            Err(format!("{pool:?}"))
        }
    });
    let running = &nomad.allocations("polydev-pool-anthropic")[0]["ClientStatus"];
    assert_eq!(running, "running", "Nomad must keep the resources of a run");

    use polydev_proto::runtime::{run_event::Event, run_input::Input};
    client.send(&run, Input::Stdin("late\n".into()));
    let mut text = String::new();
    loop {
        match client.next(&mut run).unwrap() {
            Some(Event::Stdout(output)) => text.push_str(&String::from_utf8_lossy(&output.data)),
            Some(Event::Exited(exited)) => {
                assert_eq!((text.as_str(), exited.exit_code), ("late\n", 0));
                break;
            }
            _ => {}
        }
    }
    wait_until("the allocation's end", Duration::from_secs(30), || {
        let status = nomad.allocations("polydev-pool-anthropic")[0]["ClientStatus"].clone();
        if status == "complete" {
            Ok(())
        } else {
            Err(status.to_string())
        }
    });
    assert!(docker::containers(&instance_label(&nomad.state_dir())).is_empty());
}
