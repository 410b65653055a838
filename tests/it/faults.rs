//! Faults around plain tasks: a dockerd dies, a disk is full.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use polydev_tests::{
    docker_proxy::{DockerProxy, When},
    engine::Engine,
    job::{self, batch, events, merge, service, shell, task},
    nomad::Nomad,
    tls::Certificates,
    wait_until,
};
use serde_json::{Value, json};

/// An agent whose driver uses this dockerd.
fn agent(socket: &Path) -> Nomad {
    Nomad::start_with(&format!("endpoint = \"unix://{}\"", socket.display()))
}

/// A command without a network: the test's dockerd has no bridge.
fn offline(script: &str, options: Value) -> Value {
    let mut config = shell(script);
    merge(&mut config, json!({ "network_mode": "none" }));
    merge(&mut config, options);
    config
}

/// A task that Nomad restarts repeatedly.
fn restarting(mut job: Value) -> Value {
    job["TaskGroups"][0]["RestartPolicy"] = json!({
        "Attempts": 20, "Interval": 600_000_000_000_u64, "Delay": 500_000_000, "Mode": "fail",
    });
    job
}

#[track_caller]
fn wait_nothing_left(engine: &Engine) {
    wait_until("nothing is left", Duration::from_secs(30), || {
        let left = engine.containers();
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
}

#[test]
fn tasks_outlive_a_killed_dockerd_and_the_node_says_how_it_is() {
    let mut engine = Engine::start();
    let nomad = agent(&engine.socket());
    let script = "echo one; until [ -e /alloc/go ]; do sleep 0.05; done; echo two; exit 3";
    let jobs = [("with-init", true), ("without-init", false)];
    let allocs = jobs.map(|(name, init)| {
        nomad.submit(&batch(name, offline(script, json!({ "init": init }))));
        nomad.wait_started(name)
    });
    let wait_health = |healthy: bool| {
        let word = if healthy {
            "now=\"Healthy"
        } else {
            "now=\"Unhealthy"
        };
        wait_until("the driver's word", Duration::from_secs(5), || {
            let log = nomad.agent_log();
            let last = log
                .lines()
                .rfind(|line| line.contains("] health:") || line.contains(" health: "));
            match last {
                Some(line) if line.contains(word) => Ok(()),
                last => Err(format!("{last:?}")),
            }
        });
        // An agent collects such changes for up to ten seconds.
        wait_until("the node's", Duration::from_secs(20), || {
            let driver = nomad.driver();
            if driver["Healthy"] == healthy {
                Ok(())
            } else {
                Err(driver.to_string())
            }
        });
    };
    engine.kill();
    wait_health(false);
    // Nomad has no node for it now.
    let meanwhile = "meanwhile";
    nomad.submit(&batch(
        meanwhile,
        offline("echo here", json!({ "init": true })),
    ));
    wait_until("a blocked evaluation", Duration::from_secs(20), || {
        let all = nomad.get(&format!("/v1/job/{meanwhile}/evaluations"));
        let mut found = all.as_array().into_iter().flatten();
        let is_blocked = found.any(|evaluation| evaluation["Status"] == "blocked");
        is_blocked.then_some(()).ok_or(all.to_string())
    });
    let go = |alloc: &str| {
        let folder = nomad.folder().join("data/alloc").join(alloc).join("alloc");
        fs::write(folder.join("go"), "").unwrap();
    };
    // Without dockerd, init knows how its command ended, and has moved the output.
    go(&allocs[0]);
    let ended = nomad.wait_dead("with-init");
    assert!(
        events(&ended).contains("Exit Code: 3"),
        "{}",
        events(&ended)
    );
    assert_eq!(nomad.logs(&allocs[0], "stdout"), b"one\ntwo\n");

    engine.restart();
    wait_health(true);
    let placed = nomad.wait_dead(meanwhile);
    assert!(
        events(&placed).contains("Exit Code: 0"),
        "{}",
        events(&placed)
    );
    go(&allocs[1]);
    let ended = nomad.wait_dead("without-init");
    assert!(
        events(&ended).contains("Exit Code: 3"),
        "{}",
        events(&ended)
    );
    // Output of dockerd's last second may come twice; nothing is lost.
    let output = String::from_utf8(nomad.logs(&allocs[1], "stdout")).unwrap();
    assert!(
        output == "one\ntwo\n" || output == "one\none\ntwo\n",
        "{output}"
    );
    wait_nothing_left(&engine);
}

/// A dockerd that is killed at a request of its driver.
struct Killed {
    // Dropped first: the agent's end needs the dockerd.
    nomad: Nomad,
    proxy: DockerProxy,
    engine: Arc<Mutex<Engine>>,
}

impl Killed {
    fn start() -> Self {
        let engine = Engine::start();
        let proxy = DockerProxy::start(&engine.socket());
        Self {
            nomad: agent(&proxy.socket()),
            proxy,
            engine: Arc::new(Mutex::new(engine)),
        }
    }

    fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().expect("nobody panics with it")
    }

    /// Kills dockerd at the next request of this kind about containers.
    fn kill_at(&self, when: When, method: &'static str, path_end: &'static str) {
        let is = move |request: &str| {
            request.starts_with(method)
                && request.contains("/containers")
                && request.ends_with(path_end)
        };
        self.kill_on(when, is);
    }

    fn kill_on(&self, when: When, request: impl Fn(&str) -> bool + Send + 'static) {
        let engine = self.engine.clone();
        self.proxy.on(when, request, move || {
            engine.lock().expect("nobody panics with it").kill()
        });
    }

    /// Waits until dockerd is killed, and starts it again.
    #[track_caller]
    fn revive(&self, at: &str) {
        let killed = format!("dockerd is killed at {at}");
        wait_until(&killed, Duration::from_secs(30), || {
            if self.engine().is_killed() {
                Ok(())
            } else {
                Err("still running".to_owned())
            }
        });
        self.engine().restart();
        self.nomad.wait_healthy();
    }
}

/// Takes more than a minute, so `long` has the test.
pub(crate) fn a_dockerd_is_killed_in_the_middle_of_calls() {
    let killed = Killed::start();
    tasks_end_as_they_would_with_another_dockerd(&killed);
    an_exec_fails_and_a_removal_is_made_again(&killed);
    a_pull_is_tried_again(&killed);
}

fn tasks_end_as_they_would_with_another_dockerd(killed: &Killed) {
    let nomad = &killed.nomad;
    let with_init = json!({});
    let without = json!({ "init": false });
    for (name, when, method, path_end, options) in [
        ("create", When::Asked, "POST", "/create", &with_init),
        ("created", When::Done, "POST", "/create", &with_init),
        ("start", When::Asked, "POST", "/start", &with_init),
        ("started", When::Done, "POST", "/start", &with_init),
        (
            "start-without-init",
            When::Asked,
            "POST",
            "/start",
            &without,
        ),
        (
            "started-without-init",
            When::Done,
            "POST",
            "/start",
            &without,
        ),
        ("wait", When::Asked, "GET", "/json", &without),
        ("logs", When::Asked, "GET", "/logs", &without),
    ] {
        // The start sends the same request as the wait.
        let at_end = name == "wait";
        if !at_end {
            killed.kill_at(when, method, path_end);
        }
        let script = "echo first; sleep 2; echo last";
        nomad.submit(&restarting(batch(name, offline(script, options.clone()))));
        if at_end {
            nomad.wait_started(name);
            killed.kill_at(when, method, path_end);
        }
        killed.revive(name);
        let ended = nomad.wait_dead(name);
        let told = events(&ended);
        assert!(told.contains("Exit Code: 0"), "{name}: {told}");
        let output = String::from_utf8_lossy(&nomad.logs(job::id(&ended), "stdout")).into_owned();
        assert!(
            output.starts_with("first\n") && output.ends_with("last\n"),
            "{name}: {output}"
        );
        wait_nothing_left(&killed.engine());
    }
}

fn an_exec_fails_and_a_removal_is_made_again(killed: &Killed) {
    let nomad = &killed.nomad;
    let [alloc, _] = ["open", "open-too"].map(|name| {
        let forever = offline("while :; do sleep 1; done", json!({}));
        nomad.submit(&service(name, forever));
        nomad.wait_started(name)
    });
    killed.kill_at(When::Asked, "POST", "/exec");
    let cut_off = nomad.exec(&alloc, &["true"], false, b"");
    assert!(
        cut_off.exit_code != 0 || !cut_off.error.is_empty(),
        "{cut_off:?}"
    );
    killed.revive("exec");
    let exec = nomad.exec(&alloc, &["echo", "hi"], false, b"");
    assert_eq!(exec.stdout, "hi\n", "{exec:?}");
    for (name, when) in [("open", When::Asked), ("open-too", When::Done)] {
        killed.kill_at(when, "DELETE", "");
        nomad.run(&["job", "stop", "-detach", "-yes", name]);
        killed.revive("the removal");
        let told = events(&nomad.wait_dead(name));
        assert!(told.contains("\nKilled"), "{told}");
    }
    wait_nothing_left(&killed.engine());
}

/// The registry never answers, so that the pull is certainly under way.
fn a_pull_is_tried_again(killed: &Killed) {
    let registry = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let reference = format!("{}/never:1", registry.local_addr().expect("a listener"));
    killed.kill_on(When::Asked, |request| request.ends_with("/images/create"));
    let mut job = restarting(batch(
        "pull",
        offline(
            "true",
            json!({ "image": reference, "image_pull_timeout": "2s" }),
        ),
    ));
    job["TaskGroups"][0]["RestartPolicy"]["Attempts"] = 1.into();
    task(&mut job)["RestartPolicy"] = Value::Null;
    killed.nomad.submit(&job);
    killed.revive("pull");
    let told = events(&killed.nomad.wait_dead("pull"));
    assert!(
        told.contains("\nRestarting") && told.contains("cannot pull image"),
        "{told}"
    );
}

/// C023: Nomad starts a task again if the driver died during the first start.
#[test]
fn a_driver_killed_in_the_middle_of_a_start_starts_the_task_once() {
    let proxy = DockerProxy::start(Path::new("/var/run/docker.sock"));
    let nomad = agent(&proxy.socket());
    let lock = nomad.state_dir().join("driver.lock");
    for (name, when, path_end) in [
        ("create", When::Asked, "/create"),
        ("created", When::Done, "/create"),
        ("start", When::Asked, "/start"),
        ("started", When::Done, "/start"),
    ] {
        let lock = lock.clone();
        let is = move |request: &str| {
            request.starts_with("POST")
                && request.contains("/containers")
                && request.ends_with(path_end)
        };
        let (killed, is_killed) = std::sync::mpsc::channel();
        proxy.on(when, is, move || {
            let pid = fs::read_to_string(lock).unwrap().trim().parse().unwrap();
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
            killed.send(()).unwrap();
        });
        nomad.submit(&restarting(batch(name, shell("echo ran >>/alloc/count"))));
        is_killed.recv_timeout(Duration::from_secs(30)).unwrap();
        let ended = nomad.wait_dead(name);
        let told = events(&ended);
        assert!(told.contains("Exit Code: 0"), "{name}: {told}");
        let folder = nomad.folder().join("data/alloc").join(job::id(&ended));
        let count = fs::read_to_string(folder.join("alloc/count")).unwrap();
        assert_eq!(count, "ran\n", "{name}: {told}");
    }
}

/// Docker reserves a name before the container exists: an inspect does not find it yet.
#[test]
fn a_name_that_no_container_has_yet_is_waited_for() {
    let proxy = DockerProxy::start(Path::new("/var/run/docker.sock"));
    let nomad = agent(&proxy.socket());
    let group = json!([{ "Mode": "bridge" }]);
    for (name, networks) in [("task", json!(null)), ("group", group)] {
        let (refused, is_refused) = std::sync::mpsc::channel();
        let is = |request: &str| request.ends_with("/containers/create");
        proxy.on(When::Conflict, is, move || refused.send(()).unwrap());
        let mut job = batch(name, shell("true"));
        job["TaskGroups"][0]["Networks"] = networks;
        nomad.submit(&job);
        is_refused.recv_timeout(Duration::from_secs(30)).unwrap();
        let told = events(&nomad.wait_dead(name));
        assert!(told.contains("Exit Code: 0"), "{name}: {told}");
    }
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing() {
    let engine = Engine::start();
    let nomad = agent(&engine.socket());
    engine.fill();
    nomad.submit(&batch("full", offline("true", json!({}))));
    let told = events(&nomad.wait_dead("full"));
    assert!(told.contains("no space left on device"), "{told}");
    engine.empty();
    nomad.submit(&batch("room", offline("true", json!({}))));
    let told = events(&nomad.wait_dead("room"));
    assert!(told.contains("Exit Code: 0"), "{told}");
    wait_nothing_left(&engine);
}

#[test]
fn a_task_that_could_not_be_remembered_is_not_started() {
    let engine = Engine::start();
    let nomad = Nomad::start_with_small_state(&format!(
        "endpoint = \"unix://{}\"",
        engine.socket().display()
    ));
    let filler = fs::File::create(nomad.state_dir().join("filler")).unwrap();
    std::io::copy(&mut std::io::repeat(0), &mut &filler).unwrap_err();
    nomad.submit(&batch("full", offline("true", json!({}))));
    let told = events(&nomad.wait_dead("full"));
    assert!(told.contains("No space left on device"), "{told}");
    drop(filler);
    fs::remove_file(nomad.state_dir().join("filler")).unwrap();
    nomad.submit(&batch("room", offline("true", json!({}))));
    let told = events(&nomad.wait_dead("room"));
    assert!(told.contains("Exit Code: 0"), "{told}");
    wait_nothing_left(&engine);
}

#[test]
fn a_docker_that_wants_certificates_gets_them() {
    const PORT: u16 = 2376;
    let certificates = Certificates::make();
    let engine = Engine::start_with(certificates.dockerd_options(PORT));
    let address = engine.forward(PORT);
    let nomad = Nomad::start_with(&certificates.plugin_options(address, "ours"));
    nomad.submit(&batch("sealed", offline("echo hi", json!({}))));
    let ended = nomad.wait_dead("sealed");
    assert!(
        events(&ended).contains("Exit Code: 0"),
        "{}",
        events(&ended)
    );
    assert_eq!(nomad.logs(job::id(&ended), "stdout"), b"hi\n");
    drop(nomad);

    let stranger = Nomad::launch(&certificates.plugin_options(address, "anothers"));
    wait_until("the driver's word", Duration::from_secs(30), || {
        let driver = stranger.driver();
        let why = driver["HealthDescription"].as_str().unwrap_or_default();
        if driver["Healthy"] == false && why.contains("BadCertificate") {
            Ok(())
        } else {
            Err(driver.to_string())
        }
    });
    drop(stranger);
    wait_nothing_left(&engine);
}
