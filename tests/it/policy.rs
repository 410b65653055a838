//! What roles say about runs, and what plain tasks leave to the broker.

use std::{fs, time::Duration};

use polydev_proto::runtime::{CredentialMode, ExitReason, RunStart};
use polydev_tests::{
    client::{api_key, shell as run_shell},
    fresh_key,
    host::{Host, Local},
    job::{self, merge, service, shell},
    nomad::Nomad,
    shim::Shim,
    wait_until,
};
use serde_json::json;
use tonic::Code;

use crate::survive::kill_driver;

/// Asks the model so many times, prints the statuses, and goes on.
fn asks(times: u32, and_then: &str) -> RunStart {
    let script = format!(
        "for n in $(seq {times}); do curl -s -o /dev/null -w '%{{http_code}} ' -X POST -d '{{}}' \
         http://127.0.0.1:8319/anthropic/v1/messages; done; {and_then}"
    );
    RunStart {
        credential: Some(api_key(&fresh_key())),
        credential_mode: CredentialMode::Broker.into(),
        ..run_shell("anthropic", &script)
    }
}

#[test]
fn a_users_budget_ends_a_run_and_refuses_the_next_with_the_figures() {
    let (model, elsewhere, folder) = (Local::start(), Host::start(), tempfile::tempdir().unwrap());
    let roles = folder.path().join("roles.toml");
    // The role's gateway takes the place of the pool's server, and its list that of the pool's.
    let role = format!(
        "[[role]]\nmembers = [\"uid:0\"]\nmay = [\"run\"]\ninject = false\n\
         budget = {{ requests = 3 }}\negress = [\"192.0.2.1\"]\n\
         upstream.anthropic = {{ base_url = {:?} }}\n",
        model.url
    );
    fs::write(&roles, role).unwrap();
    let egress = format!("--egress=anthropic={}:80", elsewhere.address);
    let options = ["--roles", &roles.display().to_string(), &egress];
    let shim = Shim::dev_with(&["anthropic=1"], &options);
    let client = shim.client();

    let outcome = client.run(asks(1, "true")).expect("a whole run");
    assert_eq!(outcome.stdout(), "200 ", "{}", outcome.stderr());
    client.wait_idle("anthropic", 1);
    let reach = format!(
        "curl -s -o /dev/null -w '%{{http_code}}' {}/",
        elsewhere.url
    );
    let outcome = client
        .run(run_shell("anthropic", &reach))
        .expect("a whole run");
    assert_eq!(outcome.stdout(), "403");
    assert_eq!(outcome.denied[0].denied, "not in the role's egress");
    client.wait_idle("anthropic", 1);

    let outcome = client.run(asks(4, "sleep 60")).expect("a whole run");
    let exited = &outcome.exited;
    // It ends at once, so its last words may be missing.
    assert!(outcome.stdout().starts_with("200 200 "), "{exited:?}");
    assert_eq!(exited.reason(), ExitReason::BudgetExhausted, "{exited:?}");
    let words = "the user's budget for today (UTC) is used up: 3 of 3 requests";
    assert_eq!(exited.message, words);
    assert_eq!(model.requests().len(), 3);

    let refused = wait_until("the figures", Duration::from_secs(20), || {
        let refused = client.run(asks(1, "true")).err();
        refused.ok_or_else(|| "it ran".to_owned())
    });
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("3 of 3 requests"), "{refused}");
    let another = RunStart {
        user_id: "another".into(),
        ..asks(4, "true")
    };
    let outcome = client.run(another).expect("a whole run");
    assert!(outcome.stdout().starts_with("200 200 200 "));
}

#[test]
fn a_plain_task_has_its_key_at_the_broker_and_no_network() {
    let (model, nomad, key) = (Local::start(), Nomad::start(), fresh_key());
    let mut config = shell(
        "cat /private/key || find / -xdev -name key -path '*private*'; ls /sys/class/net; wget -O- http://192.0.2.1/ 2>&1 | tail -n 1; \
         while :; do wget -q -Y off -O /dev/null --post-data '{}' \
         http://127.0.0.1:8319/anthropic/v1/messages && echo ok || echo no; sleep 0.2; done",
    );
    merge(
        &mut config,
        json!({
            "broker": [{
                "provider": "anthropic", "credential_file": "private/key",
                "upstream": [{ "base_url": model.url }],
            }],
            "egress": [{ "allow": ["example.org:443"] }],
        }),
    );
    let mut job = service("outside", config);
    job::task(&mut job)["Templates"] =
        json!([{ "EmbeddedTmpl": format!("{key}\n"), "DestPath": "private/key" }]);
    nomad.submit(&job);
    let id = nomad.wait_started("outside");
    let lines = |least: usize| {
        wait_until("its lines", Duration::from_secs(30), || {
            let text = String::from_utf8(nomad.logs(&id, "stdout")).unwrap();
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            (lines.len() >= least).then_some(lines).ok_or(text)
        })
    };
    let seen = lines(5);
    assert_eq!(seen[0], "lo");
    assert!(seen[1].contains("403"), "{seen:?}");
    // The next driver goes on with the socket that init sends again.
    kill_driver(&nomad);
    let before = lines(5).len();
    let seen = lines(before + 5);
    assert!(seen[2..].iter().all(|line| line == "ok"), "{seen:?}");
    let asked = model.requests();
    let mut shown = asked
        .iter()
        .flat_map(|request| request.credentials.values());
    assert!(shown.all(|value| *value == key));
    assert!(!asked.is_empty());
}
