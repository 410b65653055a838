//! Pools whose containers have no network, but what the broker lets through.

use std::time::Duration;

use polydev_proto::runtime::{Destination, ExitReason, RunStart};
use polydev_stand_in::Text;
use polydev_tests::{
    client::{Outcome, prompt, shell},
    docker, fresh_key,
    host::{Host, Local},
    nomad::Nomad,
    process::succeed,
    shim::Shim,
    wait_until,
};

use crate::{broker::ask, survive::kill_driver};

const PROVIDERS: [&str; 3] = ["openai", "anthropic", "google"];

/// A shim with a slot of the provider, which reaches what is in the list.
fn with_egress(provider: &str, allow: &str, options: &[&str]) -> Shim {
    let egress = format!("--egress={provider}={allow}");
    let options: Vec<&str> = options.iter().copied().chain([&*egress]).collect();
    Shim::dev_with(&[&format!("{provider}=1")], &options)
}

fn run(shim: &Shim, script: &str) -> Outcome {
    let outcome = shim.client().run(shell("anthropic", script));
    outcome.expect("a whole run")
}

fn asked(destinations: &[Destination]) -> Vec<String> {
    let name = |to: &Destination| format!("{}:{}", to.host, to.port);
    destinations.iter().map(name).collect()
}

#[test]
fn a_container_of_a_pool_that_allows_nothing_has_loopback_alone() {
    let shim = with_egress("anthropic", "", &[]);
    let [container] = &docker::containers(&shim.label())[..] else {
        panic!("one slot has one container")
    };
    let networks = &docker::inspect(container)["NetworkSettings"]["Networks"];
    assert!(networks["none"].is_object(), "{networks}");
    let script = "ls /sys/class/net; \
        curl -s -o /dev/null -w '%{http_code} ' http://198.51.100.1/; \
        curl -s -o /dev/null -w '%{http_connect} ' https://example.org/; \
        curl -s --noproxy '*' -m 5 -o /dev/null -w '%{http_code} %{exitcode}' http://198.51.100.1/";
    let outcome = run(&shim, script);
    // 7: there is no way there, so nobody has to wait for a time-out.
    assert_eq!(
        outcome.stdout(),
        "lo\n403 403 000 7",
        "{}",
        outcome.stderr()
    );
    let expected = ["198.51.100.1:80", "example.org:443"];
    assert_eq!(asked(&outcome.denied), expected);
    let reason = "not in the job's egress.allow";
    assert!(outcome.denied.iter().all(|to| to.denied == reason));
    let run = shim.client().get_run(&outcome.accepted.run_id);
    assert_eq!(run.expect("the run is known").egress, outcome.denied);
}

#[test]
fn what_is_listed_is_reached_through_the_broker_and_on_record() {
    let host = Host::start();
    let allow = format!("{}:80,*.example.org", host.address);
    let shim = with_egress("anthropic", &allow, &[]);
    let script = format!(
        "curl -s -o /dev/null -w '%{{http_code}} ' {0}/requests; \
         curl -s -p -o /dev/null -w '%{{http_connect}} %{{http_code}} ' {0}/requests; \
         curl -s -o /dev/null -w '%{{http_code}}' {0}:81/",
        host.url
    );
    let outcome = run(&shim, &script);
    assert_eq!(outcome.stdout(), "200 200 200 403", "{}", outcome.stderr());
    assert_eq!(asked(&outcome.denied), [format!("{}:81", host.address)]);
    let run_id = &outcome.accepted.run_id;
    let record = shim
        .client()
        .get_run(run_id)
        .expect("the run is known")
        .egress;
    let [reached, denied] = &record[..] else {
        panic!("{record:?}")
    };
    assert_eq!((reached.connections, &*reached.denied), (2, ""));
    assert_eq!(reached.address, host.address.to_string());
    assert!(
        reached.sent_bytes > 100 && reached.received_bytes > 100,
        "{reached:?}"
    );
    assert_eq!(denied.connections, 1);

    let show = ["egress", "show", "--user", "tester", run_id];
    let shown = succeed(&mut shim.command(&show));
    let lines: Vec<&str> = shown.lines().collect();
    assert!(
        lines[0].starts_with("DESTINATION ") && lines.len() == 3,
        "{shown}"
    );
    assert!(lines[1].starts_with(&format!("{}:80 ", host.address)) && lines[1].ends_with("yes"));
    assert!(
        lines[2].ends_with("no: not in the job's egress.allow"),
        "{shown}"
    );
}

#[test]
fn a_record_goes_on_with_the_next_driver() {
    let host = Host::start();
    let nomad = Nomad::start();
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    nomad.submit_pool_with("anthropic", 1, &format!("egress=[\"{}:80\"]", host.address));
    client.wait_idle("anthropic", 1);
    // The next driver takes over the idle container as it is.
    kill_driver(&nomad);
    let script = format!(
        "while read line; do curl -s -o /dev/null -w '%{{http_code}} ' {}/requests; done",
        host.url
    );
    let start = RunStart {
        stdin: true,
        ..shell("anthropic", &script)
    };
    let mut run = client.start(start).expect("a run");
    assert_eq!(ask(&client, &mut run), "200 ");
    kill_driver(&nomad);
    assert_eq!(ask(&client, &mut run), "200 ", "without its first driver");
    run.close();
    let outcome = client.finish_from(run, [8, 0]).expect("a whole run");
    kill_driver(&nomad);
    let record = wait_until("the next driver", Duration::from_secs(30), || {
        let run = client.get_run(&outcome.accepted.run_id);
        run.map(|run| run.egress).map_err(|error| error.to_string())
    });
    assert_eq!(asked(&record), [format!("{}:80", host.address)]);
    assert_eq!(record[0].connections, 2);
}

/// What each CLI may ask for beside its model; `docs/egress.md` has the same.
const EXTRAS: [(&str, &[&str]); 3] = [
    (
        "openai",
        &["api.github.com:443", "chatgpt.com:443", "github.com:443"],
    ),
    ("anthropic", &[]),
    ("google", &["play.googleapis.com:443"]),
];

#[test]
fn the_real_clis_work_without_a_network() {
    let model = Local::start();
    let url = |name: &str| format!("--base-url={name}={}", model.url);
    let egress = |name: &str| format!("--egress={name}=");
    let options: Vec<String> = (PROVIDERS.iter())
        .flat_map(|name| [url(name), egress(name)])
        .collect();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let shim = Shim::dev_with(&["openai=1", "anthropic=1", "google=1"], &options);
    let mut unknown = Vec::new();
    for (provider, expected) in EXTRAS {
        let text = format!("What is {}?", fresh_key());
        let start = RunStart {
            env: [].into(),
            ..prompt(provider, &text, &fresh_key(), "")
        };
        let outcome = shim.client().run(start).expect("a whole run");
        assert_eq!(outcome.exited.reason(), ExitReason::Exited);
        assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
        let answer = format!("sha256 {}", Text::of(&text).sha256);
        assert!(outcome.stdout().contains(&answer), "{}", outcome.stdout());
        let wanted = asked(&outcome.denied);
        let is_new = |to: &&String| !expected.contains(&to.as_str());
        unknown.extend(
            wanted
                .iter()
                .filter(is_new)
                .map(|to| format!("{provider}: {to}")),
        );
    }
    assert!(unknown.is_empty(), "not in the table: {unknown:?}");
}

#[test]
fn what_passes_the_broker_has_the_runs_rate_within_five_percent() {
    let host = Host::start();
    let shim = with_egress("anthropic", &format!("{}:80", host.address), &[]);
    // 2.5 MB in, and 5 MB out.
    let script = format!(
        "curl -s -o /dev/null -w '%{{time_total}} ' {0}/zeros; \
         head -c 5000000 /dev/zero | \
         curl -s -o /dev/null -w '%{{time_total}}' --data-binary @- {0}/v1/nothing",
        host.url
    );
    let outcome = run(&shim, &script);
    let took: Vec<f64> = (outcome.stdout().split(' '))
        .map(|time| time.parse().expect("seconds"))
        .collect();
    // 10 Mbit/s, as of a run on an interface.
    for (megabytes, took) in [2.5, 5.0].into_iter().zip(&took) {
        let mbits = 8.0 * megabytes / took;
        assert!((9.5..10.5).contains(&mbits), "{mbits} Mbit/s: {took} s");
    }
    assert_eq!(took.len(), 2);
}
