//! Keys stay at the node's broker: what a container has, what its model API gets, and what its
//! caller learns.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use polydev_proto::runtime::{
    CredentialMode, ExitReason, RunStart, run_event::Event, run_input::Input,
};
use polydev_stand_in::Text;
use polydev_tests::{
    broker::brokers,
    client::{Client, Run, api_key, prompt, shell},
    docker, fresh_key,
    host::Local,
    nomad::Nomad,
    shim::Shim,
    wait_until,
};

use crate::{
    secrets,
    survive::{driver, kill_driver},
};

const PROVIDERS: [&str; 3] = ["openai", "anthropic", "google"];
/// What a CLI reads in place of its key.
const PLACEHOLDER: &str = "the-key-is-at-the-broker";

/// A shim with one slot of each provider, whose model requests go to a stand-in.
struct Site {
    // Dropped before its model.
    shim: Shim,
    client: Client,
    model: Local,
}

impl Site {
    fn start(providers: &[&str]) -> Self {
        let model = Local::start();
        let pools: Vec<_> = providers.iter().map(|name| format!("{name}=1")).collect();
        let urls: Vec<_> = providers
            .iter()
            .map(|name| format!("--base-url={name}={}", model.url))
            .collect();
        let (pools, urls): (Vec<&str>, Vec<&str>) = (
            pools.iter().map(String::as_str).collect(),
            urls.iter().map(String::as_str).collect(),
        );
        let shim = Shim::dev_with(&pools, &urls);
        Self {
            client: shim.client(),
            shim,
            model,
        }
    }

    /// The process id of the node's broker.
    fn broker(&self) -> Pid {
        let found = brokers(&self.shim.state_dir());
        *found.first().expect("the driver keeps a broker")
    }
}

/// A prompt whose key is at the broker.
fn asks(provider: &str, text: &str, key: &str) -> RunStart {
    RunStart {
        env: [].into(),
        ..prompt(provider, text, key, "")
    }
}

/// A command whose key is at the broker.
fn outside(provider: &str, script: &str, key: &str) -> RunStart {
    RunStart {
        credential: Some(api_key(key)),
        credential_mode: CredentialMode::Broker.into(),
        ..shell(provider, script)
    }
}

/// The processes of all containers with the label.
fn processes(label: &str) -> Vec<Pid> {
    let ids = docker::containers(label);
    let listed = ids.iter().flat_map(|id| {
        let top = polydev_tests::process::output(docker::command().args(["top", id, "-eo", "pid"]));
        let text = String::from_utf8_lossy(&top.stdout).into_owned();
        let pids = text.lines().filter_map(|line| line.trim().parse().ok());
        pids.collect::<Vec<i32>>()
    });
    listed.map(Pid::from_raw).collect()
}

/// Where the text is in a process: its environment, its memory, and files that it may write.
fn places(text: &str, pid: Pid) -> Vec<String> {
    let root = format!("/proc/{pid}");
    let environ = fs::read(format!("{root}/environ")).unwrap_or_default();
    let mut found = Vec::new();
    if secrets::holds(text, &environ) {
        found.push(format!("the environment of {pid}"));
    }
    if secrets::memory_holds(text, pid) == Some(true) {
        found.push(format!("the memory of {pid}"));
    }
    for folder in ["home", "tmp", "workspace"] {
        let folder = format!("{root}/root/{folder}");
        for file in secrets::files(folder.as_ref()) {
            if secrets::holds(text, &fs::read(&file).unwrap_or_default()) {
                found.push(format!("file {}", file.display()));
            }
        }
    }
    found
}

#[test]
fn the_real_clis_work_with_their_keys_outside() {
    let site = Site::start(&PROVIDERS);
    let broker = site.broker();
    for provider in PROVIDERS {
        let (key, text) = (fresh_key(), format!("What is {}?", fresh_key()));
        let (mut keys, mut placeholders) = (Vec::new(), 0);
        let over = AtomicBool::new(false);
        let is_over = || over.load(Ordering::Relaxed);
        let (outcome, is_at_the_broker) = thread::scope(|scope| {
            let run = scope.spawn(|| {
                let outcome = site.client.run(asks(provider, &text, &key));
                over.store(true, Ordering::Relaxed);
                outcome
            });
            let at_the_broker = scope.spawn(|| {
                let mut found = false;
                while !is_over() {
                    found |= secrets::memory_holds(&key, broker) == Some(true);
                }
                found
            });
            while !is_over() {
                for pid in processes(&site.shim.label()) {
                    keys.extend(places(&key, pid));
                    placeholders += places(PLACEHOLDER, pid).len();
                }
            }
            (run.join().unwrap(), at_the_broker.join().unwrap())
        });
        let outcome = outcome.expect("a whole run");
        assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
        let answer = format!("sha256 {}", Text::of(&text).sha256);
        assert!(outcome.stdout().contains(&answer), "{}", outcome.stdout());
        let used = &outcome.exited.usage;
        assert!(used.len() == 1 && used[0].provider == provider, "{used:?}");
        // Of each answer, the stand-in states one token for what it was sent, and one for itself.
        let tokens = (used[0].input_tokens, used[0].output_tokens);
        let requests = used[0].requests;
        assert!(requests > 0 && tokens == (requests, requests), "{used:?}");
        let listed = site.client.get_run(&outcome.accepted.run_id);
        let listed = listed.expect("the run is known").usage;
        assert_eq!(&listed, used, "the run's end and the list agree");
        assert!(keys.is_empty(), "{provider}: {keys:?}");
        assert!(placeholders > 0, "{provider}: the search finds nothing");
        assert!(is_at_the_broker, "{provider}: nobody had the key");

        let asked = site.model.requests();
        let prompted = asked
            .iter()
            .filter(|request| request.texts.contains(&Text::of(&text)));
        let shown: Vec<_> = prompted
            .flat_map(|request| request.credentials.values())
            .collect();
        assert!(!shown.is_empty());
        assert!(
            shown.iter().all(|value| value.ends_with(&key)),
            "{provider}"
        );
        let gone = || match secrets::memory_holds(&key, broker) {
            Some(false) => Ok(()),
            other => Err(format!("{other:?}")),
        };
        wait_until("the key to be wiped", Duration::from_secs(10), gone);
    }
    let all = site.model.requests();
    let leaked = all.iter().flat_map(|request| request.credentials.values());
    assert!(leaked.into_iter().all(|value| !value.contains(PLACEHOLDER)));
}

#[test]
fn a_command_whose_key_is_outside_cannot_print_it() {
    let site = Site::start(&["anthropic"]);
    let key = fresh_key();
    let outcome = site
        .client
        .run(outside("anthropic", "env; cat /proc/1/environ", &key));
    let printed = outcome.expect("a whole run").stdout();
    assert!(
        printed.contains(&format!("ANTHROPIC_API_KEY={PLACEHOLDER}")),
        "{printed}"
    );
    assert!(!secrets::holds(&key, printed.as_bytes()), "{printed}");
}

/// What a command tries, and what it is answered: the status of HTTP, or 000 without an answer.
const ATTACKS: [(&str, &str, &str); 11] = [
    ("its own API", "-X POST $B/anthropic/v1/messages", "200"),
    ("another API", "-X POST $B/openai/v1/responses", "403"),
    (
        "another path of its API",
        "$B/anthropic/v1/organizations/users",
        "403",
    ),
    (
        "a way around",
        "--path-as-is $B/anthropic/v1/messages/../files",
        "403",
    ),
    (
        "a hidden way around",
        "--path-as-is $B/anthropic/v1/%2e%2e/files",
        "403",
    ),
    ("another method", "-X DELETE $B/anthropic/v1/models", "405"),
    (
        "another host as a proxy's client",
        "-x $B http://example.org/",
        "404",
    ),
    ("a tunnel", "-p -x $B http://example.org/", "000"),
    ("no provider", "$B/v1/messages", "404"),
    (
        "two lengths",
        "-X POST -H 'content-length: 1, 2' -d 12 $B/anthropic/v1/messages",
        "400",
    ),
    (
        // The chunks count (RFC 9112, section 6.3), and the broker sends a framing of its own.
        "a length and chunks",
        "-X POST -H 'content-length: 0' -H 'transfer-encoding: chunked' -d 12 $B/anthropic/v1/messages",
        "200",
    ),
];

#[test]
fn nothing_but_the_api_of_its_key_is_reached_from_a_container() {
    let site = Site::start(&["anthropic"]);
    let (key, another) = (fresh_key(), fresh_key());
    let mut script = "B=http://127.0.0.1:8319\n".to_owned();
    for (_, arguments, _) in ATTACKS {
        script.push_str(&format!(
            "curl -s -o /dev/null -m 5 -w '%{{http_code}}\\n' {arguments}\n"
        ));
    }
    // A key of the container's own changes nothing.
    script.push_str(&format!(
        "curl -s -o /dev/null -X POST -H 'x-api-key: {another}' \
         -H 'authorization: Bearer {another}' $B/anthropic/v1/messages?key={another}\n"
    ));
    let outcome = site
        .client
        .run(outside("anthropic", &script, &key))
        .expect("a whole run");
    let printed = outcome.stdout();
    assert_eq!(printed.lines().count(), ATTACKS.len(), "{printed}");
    for ((what, _, expected), status) in ATTACKS.iter().zip(printed.lines()) {
        assert_eq!(status, *expected, "{what}: {printed}");
    }
    // What is no HTTP is not on record.
    let refused: Vec<_> = (outcome.denied.iter())
        .map(|to| (&*to.host, to.port, to.connections))
        .collect();
    assert_eq!(refused, [("127.0.0.1", 8319, 1); 8], "{:?}", outcome.denied);
    let seen = site.model.requests();
    let places: Vec<_> = seen
        .iter()
        .map(|request| (&*request.path, &request.credentials))
        .collect();
    assert_eq!(places.len(), 3, "{places:?}");
    for (path, credentials) in places {
        assert_eq!(path, "/v1/messages");
        assert_eq!(credentials.values().collect::<Vec<_>>(), [&key]);
    }
}

#[test]
fn a_refused_key_ends_its_run_at_once() {
    let site = Site::start(&["anthropic"]);
    let key = format!("{}-refused", fresh_key());
    let outcome = site
        .client
        .run(asks("anthropic", "Hello?", &key))
        .expect("a whole run");
    let exited = outcome.exited;
    assert_eq!(exited.reason(), ExitReason::CredentialRefused, "{exited:?}");
    assert_eq!(
        exited.message,
        "the API of anthropic answered with status 401"
    );
    let prompts = site.model.requests();
    let prompts = prompts
        .iter()
        .filter(|request| request.path == "/v1/messages")
        .count();
    assert_eq!(prompts, 1, "the CLI tries again");

    // A command that handles the answer itself is not asked for its opinion.
    let script = "curl -s -X POST http://127.0.0.1:8319/anthropic/v1/messages; sleep 60";
    let outcome = site
        .client
        .run(outside("anthropic", script, &key))
        .expect("a whole run");
    assert_eq!(outcome.exited.reason(), ExitReason::CredentialRefused);
}

#[test]
fn an_overloaded_api_is_told_and_ends_a_run_that_does_not_wait() {
    let site = Site::start(&["anthropic"]);
    let key = format!("{}-busy", fresh_key());
    let script = "curl -s -X POST http://127.0.0.1:8319/anthropic/v1/messages; sleep 60";
    let start = RunStart {
        max_api_wait: Some(prost_types::Duration {
            seconds: 1,
            nanos: 0,
        }),
        ..outside("anthropic", script, &key)
    };
    let exited = site.client.run(start).expect("a whole run").exited;
    assert_eq!(exited.reason(), ExitReason::ApiUnavailable, "{exited:?}");
    assert_eq!(
        exited.message,
        "an API was overloaded for 1s: anthropic answered with status 503 (1)"
    );
    // The events had the same, as they have in every run.
    let errors: Vec<_> = exited
        .api_errors
        .iter()
        .map(|error| (&*error.provider, error.status, error.count))
        .collect();
    assert_eq!(errors, [("anthropic", 503, 1)]);
    assert!(exited.usage.is_empty());
}

/// Sends a request for each line of stdin, and prints the statuses.
const ASK_FOR_EACH_LINE: &str = "while read line; do \
    curl -s -o /dev/null -w '%{http_code} ' -X POST -d '{}' \
        http://127.0.0.1:8319/anthropic/v1/messages; done";

/// Has the run ask its model; returns the answer's status.
pub(crate) fn ask(client: &Client, run: &mut Run) -> String {
    client.send(run, Input::Stdin("\n".into()));
    loop {
        match client.next(run).expect("the run goes on") {
            Some(Event::Stdout(output)) => break String::from_utf8_lossy(&output.data).into(),
            Some(_) => {}
            None => panic!("the run ended"),
        }
    }
}

/// A run that asks for each line of its stdin.
fn asks_for_each_line(client: &Client, key: &str) -> Run {
    let start = RunStart {
        stdin: true,
        ..outside("anthropic", ASK_FOR_EACH_LINE, key)
    };
    client.start(start).expect("a run")
}

#[test]
fn another_broker_takes_the_place_of_a_killed_one_and_its_runs_go_on() {
    let site = Site::start(&["anthropic"]);
    let (killed, key) = (site.broker(), fresh_key());
    let mut run = asks_for_each_line(&site.client, &key);
    assert_eq!(ask(&site.client, &mut run), "200 ");
    kill(killed, Signal::SIGKILL).expect("it runs");
    assert_eq!(ask(&site.client, &mut run), "200 ", "it has lost its key");
    assert_ne!(site.broker(), killed);
    run.close();
    let outcome = site.client.finish_from(run, [8, 0]).expect("a whole run");
    assert_eq!(outcome.exited.exit_code, 0);

    // The slots have it too.
    site.client.wait_idle("anthropic", 1);
    let script = format!("echo | ({ASK_FOR_EACH_LINE})");
    let outcome = site
        .client
        .run(outside("anthropic", &script, &key))
        .expect("a whole run");
    assert_eq!(outcome.stdout(), "200 ");
    let seen = site.model.requests();
    let mut shown = seen.iter().flat_map(|request| request.credentials.values());
    assert!(shown.all(|value| *value == key));
}

#[test]
fn a_run_keeps_its_key_if_driver_or_broker_dies_and_loses_it_if_both_do() {
    let model = Local::start();
    let nomad = Nomad::start();
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    nomad.submit_pool_with("anthropic", 1, &format!("base_url={}", model.url));
    client.wait_idle("anthropic", 1);
    let the_broker = || {
        let found = brokers(&nomad.state_dir());
        assert_eq!(found.len(), 1, "{found:?}");
        found[0]
    };
    let key = fresh_key();
    let mut run = asks_for_each_line(&client, &key);
    let first = the_broker();
    assert_eq!(ask(&client, &mut run), "200 ");
    let is_nowhere = || {
        let places = secrets::find(&key, &nomad, &shim, &secrets::Seen::default());
        assert!(places.is_empty(), "{places:?}");
        assert!(!secrets::is_in_memory(&key, driver(&nomad.state_dir())));
    };
    is_nowhere();
    assert!(secrets::is_in_memory(&key, first));
    kill_driver(&nomad);
    assert_eq!(ask(&client, &mut run), "200 ", "without its first driver");
    assert_eq!(the_broker(), first);
    // The next driver knows the sealed key from the broker.
    kill(first, Signal::SIGKILL).expect("it runs");
    assert_eq!(ask(&client, &mut run), "200 ", "without its first broker");

    kill(driver(&nomad.state_dir()), Signal::SIGSTOP).expect("it runs");
    kill(the_broker(), Signal::SIGKILL).expect("it runs");
    kill_driver(&nomad);
    assert_eq!(ask(&client, &mut run), "403 ");
    run.close();
    client.finish_from(run, [16, 0]).expect("a whole run");
    is_nowhere();
    assert!(!secrets::is_in_memory(&key, the_broker()));
}
