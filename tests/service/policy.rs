//! What a role says about runs: refused by the shim, or told to the driver for the broker.

use std::time::Duration;

use polydev_proto::{
    broker::Egress,
    id::RunId,
    node::Slot,
    runtime::{CredentialMode, GetPoolRequest, RunStart, run_event::Event},
};
use polydev_tests::{client::api_key, folder::Folder, wait_until};
use tonic::Code;
use tonic_types::StatusExt;

use crate::site::{LIMIT, Site, at_once, myself, reason, seconds, steps};

/// Changes the slots of the node, and waits until the shim has heard of it. `image` is another one
/// each time.
fn change_slots(site: &Site, image: &str, change: impl Fn(&mut Slot)) {
    site.node().change_slots(change);
    // The shim hears of everything in order.
    wait_until("the change", LIMIT, || {
        site.node().change_slots(|slot| slot.image = image.into());
        let provider = "anthropic".to_owned();
        let client = site.shim.client();
        let pool = client.call(async |mut shim| shim.get_pool(GetPoolRequest { provider }).await);
        let pool = pool.expect("the pool is known");
        let is_told = pool.slots.iter().all(|slot| slot.image == image);
        is_told.then_some(()).ok_or(format!("{pool:?}"))
    });
}

/// A site whose callers have one role, with these lines.
fn site(lines: &str) -> (Site, Folder) {
    let folder = Folder::new("pdroles-");
    let path = folder.path().join("roles.toml");
    let myself = myself();
    let role = format!("[[role]]\nmembers = [\"{myself}\"]\nmay = [\"run\"]\n{lines}");
    std::fs::write(&path, role).expect("a file can be written");
    let options = ["--roles", &path.display().to_string()];
    let site = Site::start_with(&[("anthropic", 2)], &options);
    change_slots(&site, "has a list", |slot| {
        slot.egress = Some(Egress::default());
    });
    (site, folder)
}

/// A run of alice with a key for the broker.
fn outside() -> RunStart {
    RunStart {
        user_id: "alice".into(),
        credential: Some(api_key("key")),
        credential_mode: CredentialMode::Broker.into(),
        ..steps(&["true"])
    }
}

#[test]
fn a_run_beyond_its_users_budget_is_refused_with_the_figures() {
    let (site, _folder) =
        site("inject = false\nbudget = { requests = 10, tokens = 1000 }\negress = []");
    let client = site.shim.client();
    client.run(outside()).unwrap();
    let policy = |site: &Site| site.node().asked().claims.pop().unwrap().policy.unwrap();
    let told = policy(&site);
    assert!(told.egress.unwrap().allow.is_empty());
    let budget = told.budget.unwrap();
    assert_eq!((budget.requests, budget.used_requests), (10, 0));

    site.node().spend("bob", 99, 9999);
    site.node().spend("alice", 9, 999);
    wait_until("the figures", LIMIT, || {
        client.run(outside()).unwrap();
        let budget = policy(&site).budget.unwrap();
        let used = (budget.used_requests, budget.used_tokens);
        (used == (9, 999)).then_some(()).ok_or(format!("{used:?}"))
    });

    site.node().spend("alice", 9, 1234);
    let refused = wait_until("the refusal", LIMIT, || {
        let refused = client.run(outside()).err();
        refused.ok_or_else(|| "it runs".to_owned())
    });
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert_eq!(reason(&refused), "BUDGET_EXHAUSTED");
    let words = "user `alice`: the user's budget for today (UTC) is used up: 1234 of 1000 tokens";
    assert!(refused.message().starts_with(words), "{refused}");
    let details = refused.get_error_details();
    assert_eq!(
        details.quota_failure().unwrap().violations[0].subject,
        "user:alice"
    );
    assert!(details.retry_info().is_none(), "trying again does not help");
    // Others go on, and a run without a key needs no budget.
    let others = RunStart {
        user_id: "carol".into(),
        ..outside()
    };
    client.run(others).unwrap();
    let without = RunStart {
        user_id: "alice".into(),
        ..steps(&["true"])
    };
    client.run(without).unwrap();
}

#[test]
fn a_role_with_a_gateway_lets_no_key_pass_it() {
    let gateway = "inject = false\n[role.upstream.anthropic]\nbase_url = \"https://a.example/v1/\"";
    let (site, _folder) = site(gateway);
    let client = site.shim.client();
    client.run(outside()).unwrap();
    let claim = site.node().asked().claims.remove(0);
    let upstream = claim.policy.unwrap().upstreams.remove(0);
    assert_eq!(
        (&*upstream.provider, &*upstream.base_url),
        ("anthropic", "https://a.example/v1")
    );
    let elsewhere = RunStart {
        env: [(
            "ANTHROPIC_BASE_URL".to_owned(),
            "https://b.example".to_owned(),
        )]
        .into(),
        credential_mode: CredentialMode::Unspecified.into(),
        ..outside()
    };
    let inside = RunStart {
        credential_mode: CredentialMode::Inject.into(),
        ..outside()
    };
    for run in [elsewhere, inside] {
        let refused = client.run(run).map(drop).expect_err("it is refused");
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    }
}

#[test]
fn a_driver_that_does_not_know_roles_gets_no_run_of_one() {
    let (site, _folder) = site("egress = []");
    change_slots(&site, "older broker", |slot| slot.broker_version = 3);
    let run = RunStart {
        queue_timeout: Some(Duration::from_millis(300).try_into().unwrap()),
        ..steps(&["true"])
    };
    let refused = site
        .shim
        .client()
        .run(run)
        .map(drop)
        .expect_err("it has no slot");
    let words = "upgrade the node's driver: it does not know `budget`";
    assert!(refused.message().contains(words), "{refused}");
    assert!(site.node().asked().claims.is_empty());
}

#[test]
fn a_run_that_has_waited_is_held_to_what_was_used_meanwhile() {
    let (site, _folder) = site("inject = false\nbudget = { requests = 10 }");
    site.node().remove_slots("anthropic");
    let client = site.shim.client();
    // A shim that has not heard of it would claim one of them.
    wait_until("a shim without slots", LIMIT, || {
        let slots = client.pool("anthropic").slots;
        (slots == 0).then_some(()).ok_or(format!("{slots} slots"))
    });
    let waits = RunStart {
        stdin: true,
        ..outside()
    };
    let (_input, mut events) = client.submit(waits).unwrap();
    let first = client.next_of(&mut events).unwrap();
    assert!(matches!(first, Some(Event::Queued(_))), "{first:?}");
    site.node().spend("alice", 10, 0);
    // The shim hears of it and of the slots in two ways.
    wait_until("a shim that knows of it", LIMIT, || {
        let refused = client.run(at_once(outside())).map(drop);
        let why = reason(&refused.expect_err("there is no slot"));
        (why == "BUDGET_EXHAUSTED").then_some(()).ok_or(why)
    });
    site.node().add_slots("anthropic", 1);
    let refused = client
        .next_of(&mut events)
        .expect_err("the budget is used up");
    assert_eq!(reason(&refused), "BUDGET_EXHAUSTED", "{refused}");
    assert!(site.node().asked().claims.is_empty());
}

#[test]
fn a_run_that_exists_is_found_again_whatever_its_user_has_used() {
    let (site, _folder) = site("inject = false\nbudget = { requests = 10 }");
    let client = site.shim.client();
    let again = |run_id: String| RunStart {
        run_id,
        attempt: 2,
        ..outside()
    };
    let run_id = client.run(outside()).unwrap().accepted.run_id;
    site.node().spend("alice", 10, 0);
    wait_until("the refusal", LIMIT, || {
        let refused = client.run(outside()).err();
        refused.ok_or_else(|| "it runs".to_owned())
    });
    let found = client.run(again(run_id.clone())).unwrap();
    assert_eq!(found.accepted.run_id, run_id);
    let fresh = again(RunId::now().into());
    let refused = client
        .run(fresh)
        .map(drop)
        .expect_err("the budget is used up");
    assert_eq!(reason(&refused), "BUDGET_EXHAUSTED", "{refused}");
}

#[test]
fn a_role_with_a_list_gets_no_slot_with_a_network() {
    let (site, _folder) = site("egress = []");
    let mut odd = false;
    site.node().change_slots(|slot| {
        odd = !odd;
        slot.egress = (!odd).then(Egress::default);
    });
    let client = site.shim.client();
    client.run(steps(&["true"])).unwrap();
    let waits = || RunStart {
        queue_timeout: seconds(1),
        ..steps(&["true"])
    };
    site.node().change_slots(|slot| slot.egress = None);
    let refused = wait_until("the refusal", LIMIT, || {
        let refused = client.run(waits()).err();
        refused.ok_or_else(|| "it runs".to_owned())
    });
    assert_eq!(reason(&refused), "NO_IDLE_SLOT", "{refused}");
    assert!(refused.message().contains("`egress.allow`"), "{refused}");
}
