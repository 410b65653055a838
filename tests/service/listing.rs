//! What the shim reports of runs and pools, without the output of runs.

use std::time::Duration;

use polydev_proto::{
    node::slot::State,
    runtime::{
        CloseStdin, ExitReason, ListRunsRequest, Run, RunStart, RunState, SubmitJobRequest,
        run_event::Event, run_input::Input,
    },
};
use polydev_tests::{
    client::Client,
    fake_node::Options,
    folder::Folder,
    process::{Process, succeed},
    wait_until,
};
use serde_json::Value;
use uuid::Uuid;

use crate::site::{LIMIT, Site, steps};

/// The ids of all runs that match, from as many pages as necessary.
fn ids(client: &Client, mut request: ListRunsRequest) -> Vec<String> {
    let mut ids = Vec::new();
    loop {
        let page = client.list_runs(request.clone()).expect("runs are listed");
        assert!(page.nodes_unreachable.is_empty());
        ids.extend(page.runs.into_iter().map(|Run { run_id, .. }| run_id));
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            return ids;
        }
    }
}

/// Two nodes with four runs. Three runs of `tester` have ended, the second with status 3. A run
/// of `other` is running. Returns the runs' ids, the newest first.
fn with_runs() -> (Site, Client, polydev_tests::client::Run, Vec<String>) {
    let mut site = Site::start(&[("anthropic", 2)]);
    site.add_node(Options::default(), &[("anthropic", 2)]);
    let client = site.shim.client();
    let mut expected = Vec::new();
    for words in [&["out:some"][..], &["exit:3"], &["err:more"]] {
        let outcome = client.run(steps(words)).expect("a whole run");
        expected.insert(0, outcome.accepted.run_id);
    }
    let other = RunStart {
        user_id: "other".into(),
        stdin: true,
        ..steps(&["cat"])
    };
    let mut going = client.start(other).expect("it begins");
    let mut next = || client.next(&mut going).expect("still running");
    while !matches!(next().expect("it begins"), Event::Started(_)) {}
    expected.insert(0, going.accepted.run_id.clone());
    (site, client, going, expected)
}

#[test]
fn runs_of_all_nodes_are_listed_page_by_page() {
    let empty = Site::start(&[]);
    assert!(ids(&empty.shim.client(), ListRunsRequest::default()).is_empty());
    let (_site, client, _going, expected) = with_runs();
    // With every page size, each run comes once, the newest first.
    for page_size in [1, 2, 3, 4, 0] {
        let request = ListRunsRequest {
            page_size,
            ..Default::default()
        };
        assert_eq!(ids(&client, request), expected);
    }
    let of = |user_id: &str, states: &[RunState]| ListRunsRequest {
        user_id: user_id.into(),
        states: states.iter().map(|state| (*state).into()).collect(),
        page_size: 1,
        ..Default::default()
    };
    assert_eq!(ids(&client, of("tester", &[])), expected[1..]);
    assert_eq!(ids(&client, of("", &[RunState::Running])), expected[..1]);
    assert_eq!(ids(&client, of("", &[RunState::Ended])), expected[1..]);
    assert!(ids(&client, of("tester", &[RunState::Running])).is_empty());
    let google = ListRunsRequest {
        provider: "google".into(),
        ..Default::default()
    };
    assert!(ids(&client, google).is_empty());
}

#[test]
fn a_run_is_shown_as_far_as_it_has_come() {
    let (_site, client, going, expected) = with_runs();
    let failed = client.get_run(&expected[2]).unwrap();
    assert_eq!(failed.state(), RunState::Ended);
    let exited = failed.exited.as_ref().unwrap();
    assert_eq!((exited.reason(), exited.exit_code), (ExitReason::Exited, 3));
    let times = [failed.claimed_at, failed.started_at, failed.ended_at];
    let [claimed, started, ended] = times.map(|at| {
        let at = at.expect("an ended run");
        (at.seconds, at.nanos)
    });
    assert!(claimed <= started && started <= ended);
    assert_eq!(failed.provider, "anthropic");
    let written = client.get_run(&expected[1]).unwrap();
    assert_eq!((written.stdout_bytes, written.stderr_bytes), (0, 4));
    // A UUID may have upper case.
    let upper = client.get_run(&expected[1].to_uppercase()).unwrap();
    assert_eq!(upper.run_id, expected[1]);

    let running = client.get_run_as("other", &expected[0]).unwrap();
    assert!(running.state() == RunState::Running && running.exited.is_none());
    assert!(!running.cancelled && running.ended_at.is_none());
    client.cancel_as("other", &expected[0]).unwrap();
    client.finish(going).unwrap();
    let cancelled = client.get_run_as("other", &expected[0]).unwrap();
    assert!(cancelled.cancelled && cancelled.state() == RunState::Ended);
}

#[test]
fn the_command_line_lists_and_shows_runs() {
    let (site, client, mut going, expected) = with_runs();
    let printed = |arguments: &[&str]| succeed(&mut site.shim.command(arguments));
    let lines = printed(&["runs", "list", "--output", "json", "--limit", "3"]);
    let run_id = |line: &str| {
        let run: Value = serde_json::from_str(line).unwrap();
        run["run_id"].as_str().unwrap().to_owned()
    };
    let listed: Vec<String> = lines.lines().map(run_id).collect();
    assert_eq!(listed, expected[..3]);
    let table = printed(&["runs", "list", "--state", "running"]);
    assert_eq!(table.lines().count(), 2, "{table}");
    let show = ["runs", "show", "--output", "json", "--user", "tester"];
    let shown = printed(&[&show[..], &[expected[2].as_str()]].concat());
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["exited"]["exit_code"], 3);
    assert!(printed(&["runs", "cancel", "--user", "other", &expected[0]]).is_empty());
    while client.next(&mut going).unwrap().is_some() {}
}

#[test]
fn runs_are_watched_as_they_come_further() {
    let site = Site::start(&[("anthropic", 2)]);
    let client = site.shim.client();
    client.run(steps(&["exit:2"])).unwrap();
    let waits = RunStart {
        stdin: true,
        ..steps(&["cat", "exit:1"])
    };
    let going = client.start(waits.clone()).unwrap();

    let folder = Folder::new("pdwatch-");
    let mut command = site
        .shim
        .command(&["runs", "watch", "--user", "tester", "--output", "json"]);
    let watch = Process::start(&mut command, &folder.path().join("log"));
    let told = |run_id: &str, state: &str| {
        wait_until(&format!("{run_id} {state}"), LIMIT, || {
            let log = watch.log();
            // The last line may still be incomplete.
            let mut told = log
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok());
            let is_it = |run: &Value| run["run_id"] == run_id && run["state"] == state;
            told.find(is_it).ok_or(log.clone())
        })
    };
    // Running runs come first. Runs that ended earlier are not reported.
    told(&going.accepted.run_id, "running");
    assert_eq!(watch.log().lines().count(), 1);
    client.send(&going, Input::CloseStdin(CloseStdin {}));
    let run_id = going.accepted.run_id.clone();
    client.finish(going).unwrap();
    assert_eq!(told(&run_id, "ended")["exited"]["exit_code"], 1);

    let others = RunStart {
        user_id: "other".into(),
        ..steps(&["true"])
    };
    let others = client.run(others).unwrap().accepted.run_id;
    // The report continues after a broken connection.
    site.node().break_connections();
    let next = client.start(waits).unwrap();
    told(&next.accepted.run_id, "running");
    client.cancel(&next.accepted.run_id).unwrap();
    assert_eq!(told(&next.accepted.run_id, "ended")["cancelled"], true);
    assert!(!watch.log().contains(&others), "{}", watch.log());
}

#[test]
fn a_job_that_is_submitted_runs_without_a_caller() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let submit = |start: RunStart| {
        let request = SubmitJobRequest { start: Some(start) };
        client.call(async |mut shim| shim.submit_job(request).await)
    };
    let run_id = Uuid::now_v7().to_string();
    let job = RunStart {
        run_id: run_id.clone(),
        attempt: 1,
        ..steps(&["lines:100000", "exit:3"])
    };
    let accepted = submit(job.clone()).unwrap().accepted.unwrap();
    assert_eq!(accepted.run_id, run_id);
    // Any number of requests make only one run.
    let again = RunStart { attempt: 2, ..job };
    assert_eq!(submit(again).unwrap().accepted.unwrap(), accepted);
    let exited = wait_until("its end", LIMIT, || {
        let run = client.get_run(&run_id);
        let run = run.map_err(|status| status.to_string())?;
        run.exited.ok_or_else(|| "still running".to_owned())
    });
    assert_eq!(exited.exit_code, 3);
    let run = client.attach(&run_id, [0; 2]).unwrap();
    let outcome = client.finish(run).unwrap();
    let lines: String = (1..=100_000).map(|line| format!("{line}\n")).collect();
    assert!(outcome.stdout() == lines);
}

#[test]
fn the_command_line_submits_a_job_and_has_its_output() {
    let site = Site::start(&[("anthropic", 1)]);
    let detached = ["run", "anthropic", "--detach", "--", "cat", "out:over\n"];
    let printed = succeed(&mut site.shim.command(&detached));
    let attached = ["runs", "attach", printed.trim()];
    assert_eq!(succeed(&mut site.shim.command(&attached)), "over\n");
}

/// The shim counts every slot of every node by state, but no slots of an absent node.
#[test]
fn pools_are_counted_by_the_states_of_their_slots() {
    let mut site = Site::start(&[("anthropic", 7)]);
    site.add_node(Options::default(), &[("anthropic", 1), ("google", 2)]);
    let states = [
        State::Warming,
        State::Idle,
        State::Leased,
        State::Claimed,
        State::Recycling,
        State::Draining,
        State::Failed,
    ];
    let mut all = states.into_iter().cycle();
    site.node()
        .change_slots(|slot| slot.set_state(all.next().expect("it cycles")));
    let client = site.shim.client();
    let is_counted = |slots: u32, idle: u32| {
        wait_until("the pool", Duration::from_secs(10), || {
            let pool = client.pool("anthropic");
            let is_it = (pool.slots, pool.idle) == (slots, idle);
            is_it.then_some(pool.clone()).ok_or(format!("{pool:?}"))
        })
    };
    let pool = is_counted(8, 2);
    let others = [
        pool.warming,
        pool.leased,
        pool.claimed,
        pool.recycling,
        pool.draining,
        pool.failed,
    ];
    assert_eq!(others, [1; 6]);
    assert_eq!(client.pool("google").idle, 2);
    site.node().leave();
    is_counted(1, 1);
}

/// Bob has found out the id of alice's run, and starts one of his own with it on another node.
#[test]
fn another_users_run_with_the_same_id_hides_no_run() {
    let mut site = Site::start(&[("anthropic", 1)]);
    site.add_node(Options::default(), &[("anthropic", 1)]);
    let client = site.shim.client();
    let of = |user: &str, run_id: &str| RunStart {
        user_id: user.into(),
        run_id: run_id.into(),
        attempt: 1,
        ..steps(&["wait"])
    };
    client.wait_idle("anthropic", 2);
    let run_id = Uuid::now_v7().to_string();
    let alices = client.start(of("alice", &run_id)).expect("it begins");
    client.wait_idle("anthropic", 1);
    let bobs = client.start(of("bob", &run_id)).expect("it begins");
    for _ in 0..20 {
        for user in ["alice", "bob"] {
            let run = client.get_run_as(user, &run_id).expect("it is theirs");
            assert_eq!(run.user_id, user);
        }
        let carol = client.get_run_as("carol", &run_id).unwrap_err();
        assert_eq!(crate::site::reason(&carol), "OTHER_USER");
    }
    client.cancel_as("alice", &run_id).expect("it is hers");
    let outcome = client.finish(alices).expect("it ends");
    assert_eq!(outcome.exited.reason(), ExitReason::Cancelled);
    client.cancel_as("bob", &run_id).expect("it is his");
    client.finish(bobs).expect("it ends");
}
