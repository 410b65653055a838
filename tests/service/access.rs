//! A caller may do only what its roles allow, over every listener.

use std::{
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
};

use polydev_proto::runtime::{
    CredentialMode, DeleteCredentialRequest, GetPoolRequest, ListCredentialsRequest,
    ListPoolsRequest, ListRunsRequest, PutCredentialRequest, RotateCredentialsRequest, RunStart,
    ScalePoolRequest, SubmitJobRequest, secret::Kind,
};
use polydev_tests::{
    client::{Client, api_key, argv, in_the_clear},
    folder::Folder,
    process::output,
    program, wait_until,
};
use tonic::{Code, Status};

use crate::{
    certificates::{Tls, words},
    site::{LIMIT, Site, myself, reason, steps},
};

/// The controller may have runs of teams. The test's user on this machine may do everything.
fn roles(providers: &str) -> String {
    let myself = myself();
    format!(
        r#"
        [[role]]
        members = ["spiffe://polydev.test/controller"]
        may = ["run"]
        users = ["team-*"]
        {providers}

        [[role]]
        members = ["{myself}"]
        may = ["run", "scale", "credentials"]
        "#
    )
}

const ANTHROPIC: &str = r#"providers = ["anthropic"]"#;

fn site(tls: &Tls, pools: crate::site::Pools) -> Site {
    Site::start_with(pools, &words(&tls.options()))
}

/// Runs `polydev-shim run PROVIDER --user USER -- true` as the controller.
fn run(tls: &Tls, user: &str, provider: &str) -> Output {
    let controller = tls.files("controller");
    let mut command = Command::new(program("polydev-shim"));
    command.args(["run", provider, "--user", user, "--address"]);
    command.arg(tls.url.replace("127.0.0.1", "localhost"));
    command.arg("--tls-cert").arg(&controller.certificate);
    command.arg("--tls-key").arg(&controller.key);
    command.arg("--tls-ca").arg(&controller.authority);
    output(command.args(["--", "out:done"]))
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn is_denied<T>(answer: Result<T, Status>) {
    let status = answer.err().expect("a denial");
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    assert_eq!(reason(&status), "NOT_ALLOWED");
}

#[test]
fn the_command_line_says_who_calls() {
    let tls = Tls::with_roles(&roles(ANTHROPIC));
    let site = site(&tls, &[("anthropic", 1), ("openai", 1)]);
    let allowed = run(&tls, "team-a", "anthropic");
    assert_eq!(allowed.stdout, b"done", "{allowed:?}");
    let claim = site.node().asked().claims.remove(0);
    assert_eq!(claim.user_id, "team-a");
    assert_eq!(claim.spec.unwrap().env["USER_ID"], "team-a");
    let denied = run(&tls, "alice", "anthropic");
    assert_eq!(denied.status.code(), Some(125));
    let words = stderr(&denied);
    assert!(
        words.contains("`spiffe://polydev.test/controller` has no role"),
        "{words}"
    );
    assert_eq!(run(&tls, "team-a", "openai").status.code(), Some(125));
    assert_eq!(site.node().asked().claims.len(), 1);
}

/// Roles that are not valid change nothing.
#[test]
fn roles_hold_as_their_file_is_now() {
    let tls = Tls::with_roles(&roles(ANTHROPIC));
    let site = site(&tls, &[("openai", 1)]);
    let is_allowed = || run(&tls, "team-a", "openai").status.success();
    assert!(!is_allowed());
    tls.write_roles(&roles(""));
    let becomes = |allowed: bool| {
        wait_until("the roles", LIMIT, || {
            let words = format!("allowed is not {allowed}");
            (is_allowed() == allowed).then_some(()).ok_or(words)
        });
    };
    becomes(true);
    // Only the following calls cause warnings; allowed calls cause none.
    let warnings = || site.shim.process.log().matches(r#""level":"WARN""#).count();
    let before = warnings();
    tls.write_roles("[[role]]");
    wait_until("the warning", LIMIT, || {
        assert!(is_allowed(), "the old roles hold");
        let log = site.shim.process.log();
        let is_told = log.contains("cannot use the new roles");
        let is_new = warnings() > before;
        (is_told && is_new).then_some(()).ok_or(log)
    });
    tls.write_roles(&roles(ANTHROPIC));
    becomes(false);
}

#[test]
fn a_role_without_inject_has_no_credential_in_a_container() {
    let role = format!(
        "[[role]]\nmembers = [\"{}\"]\nmay = [\"run\"]\ninject = false",
        myself()
    );
    let tls = Tls::with_roles(&role);
    let site = site(&tls, &[("anthropic", 1)]);
    let client = site.shim.client();
    let start = |credential, mode: CredentialMode| RunStart {
        credential: Some(credential),
        credential_mode: mode.into(),
        ..argv("anthropic", &["true"])
    };
    client
        .run(start(api_key("k"), CredentialMode::Unspecified))
        .unwrap();
    let account = in_the_clear(Kind::OauthFile("{}".into()));
    for inside in [
        start(api_key("k"), CredentialMode::Inject),
        start(account, CredentialMode::Unspecified),
    ] {
        let status = client.run(inside).unwrap_err();
        assert!(status.message().contains("(`inject`)"), "{status}");
        is_denied::<()>(Err(status));
    }
    assert_eq!(site.node().asked().claims.len(), 1);
}

#[test]
fn every_call_is_denied_whom_no_role_lets_make_it() {
    let tls = Tls::with_roles(&roles(ANTHROPIC));
    let site = site(&tls, &[("anthropic", 1)]);
    let client = Client::connect_as(&tls.url, tls.files("controller")).unwrap();
    let alices = RunStart {
        user_id: "alice".into(),
        ..steps(&["true"])
    };
    let run_id = site.shim.client().run(alices.clone()).unwrap();
    let run_id = run_id.accepted.run_id;
    let request = SubmitJobRequest {
        start: Some(alices.clone()),
    };
    is_denied(client.call(async |mut shim| shim.submit_job(request).await));
    is_denied(client.run(alices));
    is_denied(client.attach_as("alice", &run_id, [0; 2]));
    is_denied(client.cancel_as("alice", &run_id));
    is_denied(client.get_run_as("alice", &run_id));
    is_denied(client.list_runs(ListRunsRequest::default()));
    let request = ScalePoolRequest {
        provider: "anthropic".into(),
        size: 0,
    };
    is_denied(client.call(async |mut shim| shim.scale_pool(request).await));
    let (user_id, provider) = ("team-a".to_owned(), "anthropic".to_owned());
    let request = PutCredentialRequest {
        user_id: user_id.clone(),
        provider: provider.clone(),
        credential: Some(api_key("k")),
        keep_refreshed: false,
    };
    is_denied(client.call(async |mut shim| shim.put_credential(request).await));
    let request = ListCredentialsRequest::default();
    is_denied(client.call(async |mut shim| shim.list_credentials(request).await));
    let request = DeleteCredentialRequest { user_id, provider };
    is_denied(client.call(async |mut shim| shim.delete_credential(request).await));
    let request = RotateCredentialsRequest::default();
    is_denied(client.call(async |mut shim| shim.rotate_credentials(request).await));
    assert_eq!(site.node().asked().claims.len(), 1, "nothing happened");
    assert!(site.node().asked().cancels.is_empty());
}

/// Every caller with a role may see pools, and the runs that the role is for.
#[test]
fn a_role_lets_its_members_look() {
    let tls = Tls::with_roles(&roles(ANTHROPIC));
    let site = site(&tls, &[("anthropic", 1)]);
    let client = Client::connect_as(&tls.url, tls.files("controller")).unwrap();
    let teams = RunStart {
        user_id: "team-a".into(),
        ..steps(&["true"])
    };
    let run_id = site.shim.client().run(teams).unwrap().accepted.run_id;
    let request = ListRunsRequest {
        user_id: "team-a".into(),
        provider: "anthropic".into(),
        ..Default::default()
    };
    let listed = client.list_runs(request).unwrap();
    assert_eq!(listed.runs[0].run_id, run_id);
    let pools = client.call(async |mut shim| shim.list_pools(ListPoolsRequest {}).await);
    assert_eq!(pools.unwrap().pools.len(), 4);
}

/// Whoever knows a run's id can ask for the run, and use the id for another one.
#[test]
fn pools_show_runs_to_those_who_may_see_them() {
    let of_pools = roles(ANTHROPIC).replace("may = [\"run\"]\n", "may = [\"scale\"]\n");
    for (roles, is_shown) in [(roles(ANTHROPIC), true), (of_pools, false)] {
        let tls = Tls::with_roles(&roles);
        let site = site(&tls, &[("anthropic", 1)]);
        for (user, is_theirs) in [("team-a", true), ("bob", false)] {
            let start = RunStart {
                user_id: user.into(),
                ..steps(&["wait"])
            };
            let local = site.shim.client();
            local.wait_idle("anthropic", 1);
            let run = local.start(start).unwrap();
            let request = GetPoolRequest {
                provider: "anthropic".into(),
            };
            let client = Client::connect_as(&tls.url, tls.files("controller")).unwrap();
            let shown = || {
                let request = request.clone();
                let pool = client.call(async |mut shim| shim.get_pool(request).await);
                let slot = pool.unwrap().slots.remove(0);
                (slot.run_id, slot.user_id)
            };
            let whose = match is_shown && is_theirs {
                true => (run.accepted.run_id.clone(), user.to_owned()),
                false => Default::default(),
            };
            wait_until("the slot of the run", LIMIT, || {
                let pool = client.pool("anthropic");
                (pool.claimed == 1).then_some(()).ok_or(format!("{pool:?}"))
            });
            assert_eq!(shown(), whose, "{user}");
            local.cancel_as(user, &run.accepted.run_id).unwrap();
            local.finish(run).unwrap();
        }
    }
}

#[test]
fn the_log_says_who_did_what_with_whose_run_and_from_where() {
    let tls = Tls::with_roles(&roles(ANTHROPIC));
    let site = site(&tls, &[("anthropic", 1)]);
    let client = Client::connect_as(&tls.url, tls.files("controller")).unwrap();
    let start = RunStart {
        user_id: "team-a".into(),
        ..steps(&["wait"])
    };
    let run = client.start(start).unwrap();
    let run_id = run.accepted.run_id.clone();
    client.get_run_as("team-a", &run_id).unwrap();
    drop(client.attach_as("team-a", &run_id, [0; 2]).unwrap());
    client.cancel_as("team-a", &run_id).unwrap();
    is_denied(client.get_run_as("bob", &run_id));
    let log = site.shim.process.log();
    for what in ["Start", "See", "Attach", "Cancel"] {
        let is_it = |line: &&str| {
            let words = [
                &*run_id,
                "team-a",
                "spiffe://polydev.test/controller",
                r#""from":"127.0.0.1:"#,
            ];
            line.contains(&format!("\"operation\":\"{what}\""))
                && words.iter().all(|word| line.contains(word))
        };
        assert!(log.lines().find(is_it).is_some(), "{what}: {log}");
    }
    let denied = log.lines().find(|line| line.contains("denied")).unwrap();
    assert!(
        denied.contains("bob") && denied.contains(r#""from":"127.0.0.1:"#),
        "{denied}"
    );
}

#[test]
fn a_role_for_one_provider_is_none_for_runs_of_others() {
    let tls = Tls::with_roles(&roles(ANTHROPIC));
    let site = site(&tls, &[("anthropic", 1), ("openai", 1)]);
    let (local, client) = (
        site.shim.client(),
        Client::connect_as(&tls.url, tls.files("controller")).unwrap(),
    );
    let run_of = |provider: &str| {
        let start = RunStart {
            user_id: "team-a".into(),
            ..argv(provider, &["true"])
        };
        local.run(start).unwrap().accepted.run_id
    };
    let (of_openai, of_anthropic) = (run_of("openai"), run_of("anthropic"));
    is_denied(client.attach_as("team-a", &of_openai, [0; 2]));
    is_denied(client.get_run_as("team-a", &of_openai));
    is_denied(client.cancel_as("team-a", &of_openai));
    client.get_run_as("team-a", &of_anthropic).unwrap();
    client.cancel_as("team-a", &of_anthropic).unwrap();
}

/// With roles, every user of the machine may use the unix socket. The user id identifies them.
#[test]
fn users_of_the_machine_are_held_to_their_roles() {
    let folder = Folder::new("pdroles-");
    let path = folder.path().join("roles.toml");
    let myself = myself();
    let roles = format!(
        "[[role]]\nmembers = [\"{myself}\"]\nmay = [\"run\", \"credentials\"]\n\
         providers = [\"codex\"]\n"
    );
    std::fs::write(&path, roles).unwrap();
    let site = Site::start_with(&[], &["--roles", &path.display().to_string()]);
    assert_eq!(mode(&site), 0o666);
    let said = |arguments: &[&str]| {
        let output = output(&mut site.shim.command(arguments));
        (output.status.code(), stderr(&output))
    };
    let (code, words) = said(&["runs", "list", "--provider", "openai"]);
    assert_eq!(code, Some(0), "{words}");
    for denied in [
        &["runs", "list"][..],
        &["runs", "list", "--provider", "google"],
        &["credentials", "list"],
        &["credentials", "rotate"],
        &["pool", "scale", "openai", "0"],
        &["run", "anthropic", "--", "true"],
    ] {
        let (code, words) = said(denied);
        assert_eq!(code, Some(125), "{denied:?}");
        assert!(words.contains(&format!("`{myself}`")), "{words}");
    }
    let without_roles = Site::start(&[]);
    assert_eq!(mode(&without_roles), 0o600);
}

/// The permission bits of the shim's socket.
fn mode(site: &Site) -> u32 {
    let socket = Path::new(site.shim.address.trim_start_matches("unix://"));
    let metadata = std::fs::metadata(socket).expect("the shim has a socket");
    metadata.permissions().mode() & 0o777
}
